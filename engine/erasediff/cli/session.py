"""What ``train`` and ``unlearn`` share: where the run goes, and carrying it out or only planning it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from erasediff.cli.options import configure
from erasediff.cli.output import emit, loading, messages
from erasediff.cli.worker import is_rank
from erasediff.config import Config, check_offload, check_shares

if TYPE_CHECKING:
    from erasediff.training.job import TrainingJob
    from erasediff.training.run_dir import RunPlace


_instead_of_the_plan: ContextVar[Callable[[TrainingJob], None] | None] = ContextVar("instead_of_the_plan", default=None)


def resolve_run(
    out: Path | None,
    resume: str | None,
    file: Path | None,
    settings: list[str] | None,
    *,
    dry_run: bool = False,
    **flags: Any,
) -> tuple[RunPlace | None, Config]:
    """Where to run (None: nowhere, it is dry) and the full configuration: by default, the resumed run's own."""
    fresh = None if resume else configure(file, settings, **flags)
    if fresh and dry_run:
        return None, fresh
    with loading(messages):
        from erasediff.training.run_dir import RunPlace
    place = RunPlace.asked_for(out, resume)
    config = fresh or configure(file or place.stored_config, settings, **flags)
    return None if dry_run else place, config


def launch_workers(config: Config, section: Literal["train", "unlearn"]) -> None:
    """Where ``config`` asks for several processes and none has started them yet, start them, and end as they do.

    UserError for what they could not offload, for a DeepSpeed configuration that no run can use, and for a batch size
    of ``section`` that they could not share, if it is set: the usual one depends on the model.
    """
    check_offload(config.distributed)
    if config.distributed.launch == "none" or is_rank():
        return
    asked = getattr(config, section)
    if "batch_size" in asked.model_fields_set:
        check_shares(asked.batch_size, f"{section}.batch_size", config.distributed.processes)
    with loading(messages):
        from erasediff.parallel.launch import launch
        from erasediff.parallel.zero.config import zero_stage
    if config.distributed.launch == "zero":
        zero_stage(config.distributed)
    raise SystemExit(launch(sys.argv[1:], config.distributed.processes))


def run_job(session: TrainingJob, place: RunPlace | None, *, as_json: bool) -> None:
    """Run ``session`` at ``place`` and print its result; without a place, print the plan, or do what was asked for."""
    if place is None and (instead := _instead_of_the_plan.get()) is not None:
        instead(session)
        return
    if place is None:
        from erasediff.workflows.dry_run import dry_run

        with messages.status("Measuring trial steps"):
            measured = dry_run(session)
        emit(asdict(measured), as_json=as_json)
        return
    result = session.run(place, messages)
    emit({**asdict(result), "run": str(result.run), "model": str(result.model)}, as_json=as_json)


@contextmanager
def instead_of_the_plan(use: Callable[[TrainingJob], None]) -> Iterator[None]:
    """Within the block, a dry run hands its session to ``use``."""
    token = _instead_of_the_plan.set(use)
    try:
        yield
    finally:
        _instead_of_the_plan.reset(token)

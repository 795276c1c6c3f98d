"""Runs of ``train`` and ``unlearn``: folder, configuration, worker processes, result."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from erasediff.cli.crash import keep_crash_log_in
from erasediff.cli.options import configure
from erasediff.cli.output import emit, loading, messages
from erasediff.cli.worker import is_rank
from erasediff.config import Config, check_offload, check_shares

if TYPE_CHECKING:
    from erasediff.training.job import StandaloneJob, TrainingJob
    from erasediff.training.run_dir import RunPlace


def resolve_run(
    out: Path | None,
    resume: str | None,
    file: Path | None,
    settings: list[str] | None,
    *,
    dry_run: bool = False,
    **flags: Any,
) -> tuple[RunPlace | None, Config]:
    """Resolve the run folder (None for a dry run) and the full configuration, by default the resumed run's own."""
    fresh = None if resume else configure(file, settings, **flags)
    if fresh and dry_run:
        return None, fresh
    with loading(messages):
        from erasediff.training.run_dir import RunPlace
    place = RunPlace.asked_for(out, resume)
    keep_crash_log_in(place.path)
    config = fresh or configure(file or place.stored_config, settings, **flags)
    return None if dry_run else place, config


def launch_workers(config: Config, section: Literal["train", "unlearn"]) -> None:
    """Start the processes that ``config`` asks for, unless a launcher has, and exit as they do.

    Without ``distributed.processes``, as many as there are GPUs, or one on a CPU.

    Raises:
        UserError: for what they could not offload, for a DeepSpeed configuration that no run can use, and for a batch
            size of ``section`` that they could not share, if it is set: its default depends on the model.
    """
    check_offload(config.distributed)
    if config.distributed.launch == "none" or is_rank():
        return
    settings = getattr(config, section)
    if "batch_size" in settings.model_fields_set:
        check_shares(settings.batch_size, f"{section}.batch_size", _processes(config))
    if config.distributed.launch == "zero":
        with loading(messages):
            from erasediff.parallel.zero.config import zero_stage
        zero_stage(config.distributed)
    launch_ranks(config)


def launch_ranks(config: Config) -> None:
    """Start the processes that ``config`` asks for, unless a launcher has, and exit as they do."""
    if config.distributed.launch == "none" or is_rank():
        return
    with loading(messages):
        from erasediff.parallel.launch import launch
    processes, arguments = _processes(config), sys.argv[1:]
    if "processes" not in config.distributed.model_fields_set:
        arguments = [*arguments, "--processes", str(processes)]
    raise SystemExit(launch(arguments, processes))


def _processes(config: Config) -> int:
    """Processes on this machine: as many as there are GPUs, where no number is set."""
    if "processes" in config.distributed.model_fields_set:
        return config.distributed.processes
    return _gpu_count(config.device) or config.distributed.processes


def _gpu_count(device: str) -> int:
    """The GPUs that ranks on ``device`` can share: none for a CPU."""
    import torch

    return torch.cuda.device_count() if device in ("auto", "cuda") else 0


def run_job(
    job: TrainingJob | StandaloneJob, place: RunPlace | None, *, as_json: bool, out: Path | None = None
) -> None:
    """Run ``job`` at ``place`` and print its result.

    Without a place, measure trial steps and print the plan, after a check that a run could be written to ``out``.
    """
    from erasediff.training.job import StandaloneJob

    if isinstance(job, StandaloneJob):
        assert place is not None
        emit(job.run(place, messages), as_json=as_json)
        return
    if place is None:
        from erasediff.workflows.dry_run import dry_run

        if out is not None:
            job.check_storage(out)
        with messages.status("Measuring trial steps"):
            measured = dry_run(job)
        emit(asdict(measured), as_json=as_json)
        return
    result = job.run(place, messages)
    emit({**asdict(result), "run": str(result.run), "model": str(result.model)}, as_json=as_json)

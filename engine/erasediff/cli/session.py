"""Runs of ``train`` and ``unlearn``: folder, configuration, worker processes, result."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from erasediff.cli.crash import keep_crash_log_in
from erasediff.cli.options import configure
from erasediff.cli.output import emit, loading, messages
from erasediff.cli.worker import is_rank
from erasediff.config import Config, check_offload, check_shares
from erasediff.errors import RunFailedError
from erasediff.io.disk_room import check_folder

if TYPE_CHECKING:
    from erasediff.provenance.ssh_signature import SshKey
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
    if out is not None:
        check_folder(out)
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


def signing_key(name: str | None) -> SshKey | None:
    """Key of ``--sign``, before anything is prepared. UserError for one that cannot sign."""
    from erasediff.provenance.ssh_signature import SshKey

    return None if name is None else SshKey.named(name)


def run_job(
    build: Callable[[], tuple[RunPlace | None, TrainingJob | StandaloneJob]],
    command: Literal["train", "unlearn"],
    *,
    as_json: bool,
    out: Path | None = None,
    key: SshKey | None = None,
) -> None:
    """Run the job that ``build`` returns, leave the receipt of ``command`` at its place, signed with ``key``, and print
    the result.

    Without a place, measure trial steps and print the plan, after a check that a run could be written to ``out``. An
    unlearning run ends with a verdict, when the job has left memory.

    Raises:
        RunFailedError: The verdict is not that the model has forgotten and retained what it should.
    """
    from erasediff.provenance.receipt import record_run
    from erasediff.training.job import StandaloneJob

    place, job = build()
    config = job.config
    if place is None:
        assert not isinstance(job, StandaloneJob)
        from erasediff.workflows.dry_run import dry_run

        if out is not None:
            job.check_storage(out)
        with messages.status("Measuring trial steps"):
            measured = dry_run(job)
        emit(asdict(measured), as_json=as_json)
        return
    if isinstance(job, StandaloneJob):
        report = job.run(place, messages)
        model, eraser = config.unlearn.model, Path(report["eraser"])
    else:
        result = job.run(place, messages)
        report = {**asdict(result), "run": str(result.run), "model": str(result.model)}
        model, eraser = result.model, None
    del job
    ended = None
    if command == "unlearn" and config.verdict.enabled:
        from erasediff.workflows.end_of_run import end_run

        assert model is not None
        line = shlex.join(["erasediff", *sys.argv[1:]])
        ended = end_run(config, place.path, model, messages, command=line, eraser=eraser)
        report |= {"verdict": ended.sentence, "report": ended.report} | ({} if eraser else {"model": ended.model})
    record_run(place.path, command, key)
    emit(report, as_json=as_json)
    if ended is not None and ended.failure is not None:
        raise RunFailedError(ended.failure)

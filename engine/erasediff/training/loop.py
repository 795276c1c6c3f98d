"""Training loop of every run: steps, metrics, checkpoints, and a stop on request."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor, nn

from erasediff.config import RunConfig
from erasediff.data.prefetch import Prefetcher
from erasediff.diffusion.batch import Batch
from erasediff.errors import Interrupted, RunFailedError, UserError
from erasediff.methods import Solver
from erasediff.parallel.control_plane import ControlPlane
from erasediff.training.checkpoint import Checkpoint, snapshot_of
from erasediff.training.checkpoint_writer import CheckpointWriter
from erasediff.training.collapse_guard import DRIFT, Collapse, CollapseGuard
from erasediff.training.graceful_stop import AgreedStop, stop_on_signal
from erasediff.training.rounds import Rounds, end_of_round
from erasediff.training.run_dir import RunFolder
from erasediff.utils.progress import progress_bar

SKIPPED_LIMIT = 10
"""A run fails if more than one in this many of its steps was skipped."""
HOPELESS = signal.NSIG
"""In the place of a signal's number: the main rank, which reads the metrics, has seen more skipped steps than that."""


class MetricBuffer:
    """Buffer of the 0-D tensors of many steps; ``take`` reads them all from the device in one transfer."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, dict[str, Tensor]]] = []

    def add(self, step: int, scalars: dict[str, Tensor]) -> None:
        """Add the scalars of ``step`` without reading them."""
        self._steps.append((step, scalars))

    def take(self) -> list[dict[str, Any]]:
        """One record ``{"step": ..., name: number}`` for each step added since the last call."""
        tensors = [tensor for _, scalars in self._steps for tensor in scalars.values()]
        if not tensors:
            return []
        # float64 holds every float32, bool and step count exactly.
        numbers = iter(torch.stack([tensor.detach().to(torch.float64) for tensor in tensors]).tolist())
        records = [
            {"step": step} | {name: _as_python_number(next(numbers), tensor.dtype) for name, tensor in scalars.items()}
            for step, scalars in self._steps
        ]
        self._steps.clear()
        return records


def _as_python_number(number: float, dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return bool(number)
    return number if dtype.is_floating_point else int(number)


class Batches(Protocol):
    """Batches addressed by step number, so that a resumed run sees what the uninterrupted one would have.

    A run loads them one step ahead, in a thread: a batch must be a function of the step alone.
    """

    def at(self, step: int) -> Batch: ...


def prefetched(
    retain: Batches, forget: Batches | None, *, stop: int, round_steps: int | None = None
) -> Prefetcher[tuple[Batch, Batch]]:
    """Batches (retain, forget) of each step before ``stop``, loaded one step ahead; {} in place of None.

    After ``round_steps`` steps they come again from the first on.
    """

    def load(step: int) -> tuple[Batch, Batch]:
        step = step if round_steps is None else step % round_steps
        return retain.at(step), forget.at(step) if forget is not None else {}

    return Prefetcher(load, stop=stop)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a loop.

    Attributes:
        steps: Number of steps taken by this process.
        seconds: Wall time of the steps, checkpoints included.
        last: Metrics of the last step.
        collapse: Collapse that has stopped the run; there is no checkpoint of its last step.
    """

    steps: int
    seconds: float
    last: dict[str, Any]
    collapse: Collapse | None = None


def run_steps(
    method: Solver,
    model: nn.Module,
    run: RunFolder,
    *,
    steps: int,
    settings: RunConfig,
    retain: Batches,
    forget: Batches | None = None,
    before_step: Callable[[int], None] | None = None,
    console: Console,
    title: str,
    shared: bool = False,
    guard: CollapseGuard | None = None,
    rounds: Rounds | None = None,
) -> Outcome:
    """Take ``method`` to ``steps`` steps in all, from where ``run`` resumes.

    The device is read every ``settings.log_every`` steps, at checkpoints and by looks of ``guard``, never in between.
    Batches are loaded one step ahead, and the checkpoints of one process are written in the background. A checkpoint
    holds the weights that are trained, optimizer, method and random state, so a run killed at any step and resumed ends
    bit for bit where the uninterrupted one does, its metrics file included: a step's metrics are on the disk before a
    checkpoint after it.

    Args:
        method: Takes the steps.
        model: The network that it trains, without a parallel wrapper.
        run: Folder of metrics and checkpoints.
        steps: Number of steps of the whole run, those before a resumed checkpoint included.
        settings: Intervals of logging and checkpoints.
        retain: Batches of retained data.
        forget: Batches of forgotten data; None for a method that gets an empty batch instead.
        before_step: Called with the number of each step, counted from 0.
        console: Console of the progress bar and notes.
        title: Title of the progress bar.
        shared: Several ranks run the loop together: a collective, of which the main rank alone writes metrics.
        rounds: Decides after ``steps`` steps, and each time after as many more on the same batches, whether to go on.
        guard: Looks at what should be kept, and may stop the run; it changes no bit of one that it does not stop.

    Raises:
        Interrupted: SIGINT, SIGTERM or SIGHUP arrived; a checkpoint has been written.
        RunFailedError: More steps were skipped than a run may skip in all, whatever the remaining ones bring.
        UserError: The device ran out of memory, or the disk refuses metrics or a checkpoint.
        Exception: Any error of the method and from batches. A checkpoint under way is completed first.
    """
    is_main = ControlPlane.current().is_main
    snapshot = snapshot_of(method, model, shared=shared)
    if guard is not None:
        guard.begin()
    if run.resume_from is not None:
        snapshot.restore(run.resume_from)
    if is_main:
        damaged = run.metrics.continue_after(method.iteration)
        if damaged:
            console.print(f"{run.metrics.path} had {damaged} damaged lines, which were left out.", soft_wrap=True)
    if guard is not None:
        guard.extend(end_of_round(method.iteration, steps))
        guard.resume(method.iteration, run.metrics.read() if is_main else ())
    start, began = method.iteration, time.monotonic()
    end = end_of_round(start, steps)
    metrics = MetricBuffer()
    last: dict[str, Any] = {}

    def log() -> None:
        nonlocal last
        if is_main and (records := metrics.take()):
            run.metrics.append(records)
            last = records[-1]
            bar.note(_summary(last))

    def save_checkpoint() -> Checkpoint:
        log()
        # Before the copy, so that the host holds one copy of the state at a time.
        writer.wait()
        step, save = method.iteration, snapshot.capture()
        writer.start(lambda: run.save_checkpoint(step, save, keep=settings.keep_checkpoints))
        return run.checkpoint(step)

    with (
        progress_bar(console, title, end, completed=start) as bar,
        stop_on_signal(console.print) as stop_request,
        CheckpointWriter(background=snapshot.in_background) as writer,
        prefetched(
            retain,
            forget,
            stop=steps if rounds is None else rounds.max_steps,
            round_steps=None if rounds is None else steps,
        ) as batches,
    ):

        def reason_to_stop() -> int | None:
            is_hopeless = last.get("skipped", 0) * SKIPPED_LIMIT > end
            return HOPELESS if is_hopeless else stop_request.signal_number

        stop = AgreedStop(reason_to_stop)
        index = start
        while True:
            if index >= end:
                if rounds is None or not rounds.goes_on(index):
                    break
                end += steps
                bar.extend(end)
                if guard is not None:
                    guard.extend(end)
            if before_step is not None:
                before_step(index)
            try:
                report = method.step(*batches.at(index))
            except torch.OutOfMemoryError:
                raise UserError("The device ran out of memory: lower batch_size or raise accumulation_steps.") from None
            drift = None if guard is None else guard.look_after(index + 1)
            if is_main:
                metrics.add(index + 1, report.scalars() | ({} if drift is None else {DRIFT: drift}))
            bar.advance()
            writer.check()
            if (index + 1) % settings.log_every == 0:
                log()
            signal_number = stop.after_step()
            if signal_number == HOPELESS:
                check_skipped_steps(method, end, run.path)
            if guard is not None and guard.collapse is not None:
                log()
                break
            if (index + 1) % settings.checkpoint_every == 0 or index + 1 == end or signal_number is not None:
                saved = save_checkpoint()
                if signal_number is not None:
                    writer.wait()
                    raise Interrupted(signal_number, saved.step, saved.path)
            index += 1
        stop.close()
    # Those that the last save of a killed run did not come to remove.
    run.remove_old_checkpoints(settings.keep_checkpoints)
    return Outcome(
        steps=method.iteration - start,
        seconds=time.monotonic() - began,
        last=last,
        collapse=None if guard is None else guard.collapse,
    )


def check_skipped_steps(method: Solver, steps: int, run: Path) -> None:
    """Check the steps that ``method`` skipped, those of the runs that this one continues included.

    The count is the same on each rank, and is read from the device.

    Args:
        method: The solver.
        steps: Steps of the whole run that are to change weights.
        run: Folder of the run, named in the error.

    Raises:
        RunFailedError: More than one in ``SKIPPED_LIMIT`` of ``steps`` was skipped.
    """
    skipped = int(method.skipped)
    if skipped * SKIPPED_LIMIT > steps:
        raise RunFailedError(
            f"{skipped} of {method.updates} steps were skipped since their gradients were not finite, so no model was "
            f"saved: lower the learning rate, or use another precision; the run stays in {run}."
        )


def _summary(record: dict[str, Any]) -> str:
    shown = {"retain_loss": "retain", "forget_loss": "forget", "multiplier": "λ", "skipped": "skipped"}
    return "  ".join(f"{label} {record[name]:.3g}" for name, label in shown.items() if record.get(name))

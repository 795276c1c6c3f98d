"""The loop that every training and unlearning run goes through."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor, nn

from erasediff.config import RunConfig
from erasediff.diffusion.batch import Batch
from erasediff.errors import Interrupted, UserError
from erasediff.methods import Solver
from erasediff.parallel.control_plane import ControlPlane
from erasediff.training.checkpoint import Checkpoint, snapshot_of
from erasediff.training.graceful_stop import AgreedStop, stop_on_signal
from erasediff.training.run_dir import RunFolder
from erasediff.utils.progress import progress_bar


class MetricBuffer:
    """Collects the 0-D tensors of many steps; ``take`` reads them all in one transfer."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, dict[str, Tensor]]] = []

    def add(self, step: int, scalars: dict[str, Tensor]) -> None:
        """Remember the scalars of ``step`` without reading them."""
        self._steps.append((step, scalars))

    def take(self) -> list[dict[str, Any]]:
        """One record ``{"step": ..., name: number}`` for each step added since the last call."""
        tensors = [tensor for _, scalars in self._steps for tensor in scalars.values()]
        if not tensors:
            return []
        # float64 holds every float32, bool and step count exactly.
        numbers = iter(torch.stack([tensor.detach().to(torch.float64) for tensor in tensors]).tolist())
        records = [
            {"step": step} | {name: _plain(next(numbers), tensor.dtype) for name, tensor in scalars.items()}
            for step, scalars in self._steps
        ]
        self._steps.clear()
        return records


def _plain(number: float, dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return bool(number)
    return number if dtype.is_floating_point else int(number)


class Batches(Protocol):
    """Batches addressed by step number, so that a resumed run sees what the uninterrupted one would have."""

    def at(self, step: int) -> Batch: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """The steps taken by this process and their time; ``last`` holds the metrics of the last one."""

    steps: int
    seconds: float
    last: dict[str, Any]


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
) -> Outcome:
    """Take ``method`` to ``steps`` steps in all, from where ``run`` resumes.

    The device is read every ``settings.log_every`` steps and at checkpoints, never in between. A checkpoint holds
    the weights that are trained, optimizer, method and random state, so a run killed at any step and resumed ends bit
    for bit where the uninterrupted one does, its metrics file included. A method that looks at retained data alone gets
    an empty forget batch. Raises ``Interrupted`` after a Ctrl-C, with a checkpoint written.

    Where the run is ``shared``, every rank of it calls this at the same time; the main one alone writes metrics.
    """
    is_main = ControlPlane.current().is_main
    snapshot = snapshot_of(method, model, shared=shared)
    if run.resume_from is not None:
        snapshot.restore(run.resume_from)
    if is_main:
        run.metrics.cut_back(method.iteration)
    start, began = method.iteration, time.monotonic()
    readout = MetricBuffer()
    last: dict[str, Any] = {}

    def log() -> None:
        nonlocal last
        if is_main and (records := readout.take()):
            run.metrics.append(records)
            last = records[-1]
            bar.note(_summary(last))

    def checkpoint() -> Checkpoint:
        log()
        return run.save_checkpoint(method.iteration, snapshot.save, keep=settings.keep_checkpoints)

    with progress_bar(console, title, steps, completed=start) as bar, stop_on_signal(console.print) as stop_request:
        stop = AgreedStop(lambda: stop_request.signal_number)
        for index in range(start, steps):
            if before_step is not None:
                before_step(index)
            try:
                report = method.step(retain.at(index), forget.at(index) if forget is not None else {})
            except torch.OutOfMemoryError:
                raise UserError("The device ran out of memory: lower batch_size or raise accumulation_steps.") from None
            if is_main:
                readout.add(index + 1, report.scalars())
            bar.advance()
            signal_number = stop.after_step()
            if (index + 1) % settings.log_every == 0:
                log()
            if (index + 1) % settings.checkpoint_every == 0 or index + 1 == steps or signal_number is not None:
                saved = checkpoint()
                if signal_number is not None:
                    raise Interrupted(signal_number, saved.step, saved.path)
        stop.close()
    return Outcome(steps=steps - start, seconds=time.monotonic() - began, last=last)


def _summary(record: dict[str, Any]) -> str:
    shown = {"retain_loss": "retain", "forget_loss": "forget", "multiplier": "λ", "skipped": "skipped"}
    return "  ".join(f"{label} {record[name]:.3g}" for name, label in shown.items() if record.get(name))

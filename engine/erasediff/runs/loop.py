"""The loop that every training and unlearning run goes through."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import nn

from erasediff.config import RunConfig
from erasediff.errors import UserError
from erasediff.methods import Method
from erasediff.objectives import Batch
from erasediff.runs.checkpoint import Checkpoint
from erasediff.runs.folder import RunFolder
from erasediff.runs.interrupt import Interrupted, stop_on_signal
from erasediff.runs.progress import progress_bar
from erasediff.runs.readout import Readout


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
    method: Method,
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
) -> Outcome:
    """Take ``method`` to ``steps`` steps in all, from where ``run`` resumes.

    The device is read every ``settings.log_every`` steps and at checkpoints, never in between. A checkpoint holds
    the weights that are trained, optimizer, method and random state, so a run killed at any step and resumed ends bit
    for bit where the uninterrupted one does, its metrics file included. A method that looks at retained data alone gets
    an empty forget batch. Raises ``Interrupted`` after a Ctrl-C, with a checkpoint written.
    """
    device = next(model.parameters()).device
    if (state := run.load_checkpoint(device)) is not None:
        _restore(state, method, model)
    run.metrics.cut_back(method.iteration)
    start, began = method.iteration, time.monotonic()
    readout = Readout()
    last: dict[str, Any] = {}

    def log() -> None:
        nonlocal last
        if records := readout.take():
            run.metrics.append(records)
            last = records[-1]
            bar.note(_summary(last))

    def checkpoint() -> Checkpoint:
        log()
        return run.save_checkpoint(method.iteration, _snapshot(method, model), keep=settings.keep_checkpoints)

    with progress_bar(console, title, steps, completed=start) as bar, stop_on_signal(console.print) as stop_request:
        for index in range(start, steps):
            if before_step is not None:
                before_step(index)
            try:
                report = method.step(retain.at(index), forget.at(index) if forget is not None else {})
            except torch.OutOfMemoryError:
                raise UserError("The device ran out of memory: lower batch_size or raise accumulation_steps.") from None
            readout.add(index + 1, report.scalars())
            bar.advance()
            if (index + 1) % settings.log_every == 0:
                log()
            if (index + 1) % settings.checkpoint_every == 0 or index + 1 == steps or stop_request:
                saved = checkpoint()
                if stop_request.signal_number is not None:
                    raise Interrupted(stop_request.signal_number, saved.step, saved.path)
    return Outcome(steps=steps - start, seconds=time.monotonic() - began, last=last)


def _snapshot(method: Method, model: nn.Module) -> dict[str, Any]:
    frozen = _frozen(model)
    return {
        "model": {name: tensor for name, tensor in model.state_dict().items() if name not in frozen},
        "method": {"name": method.name, "state": method.state_dict()},
        "random": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
    }


def _restore(state: dict[str, Any], method: Method, model: nn.Module) -> None:
    missing, unexpected = model.load_state_dict(state["model"], strict=False)
    if unexpected or not _frozen(model).issuperset(missing):
        raise ValueError(f"the checkpoint is of another model: {[*unexpected, *missing][:3]}")
    method.load_state_dict(state["method"]["state"])
    torch.set_rng_state(state["random"]["cpu"].cpu())
    if len(state["random"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([generator.cpu() for generator in state["random"]["cuda"]])


def _frozen(model: nn.Module) -> set[str]:
    """The weights that no step changes: they are where the model was loaded from."""
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def _summary(record: dict[str, Any]) -> str:
    shown = {"retain_loss": "retain", "forget_loss": "forget", "multiplier": "λ", "skipped": "skipped"}
    return "  ".join(f"{label} {record[name]:.3g}" for name, label in shown.items() if record.get(name))

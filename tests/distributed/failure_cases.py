"""Steps that fail part-way and are tried again, with the denoiser of the tests of gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import batches, take_steps, unlearner
from torch import Tensor, nn

from erasediff import EraseDiff
from erasediff.parallel.full_weights import full_weights
from erasediff.parallel.world import World

FAILURES: list[tuple[str, int, type[BaseException]]] = [
    ("forward", 2, torch.OutOfMemoryError),
    ("backward", 2, torch.OutOfMemoryError),
    ("forward", 4, ValueError),
    ("backward", 4, KeyboardInterrupt),
]
"""(direction, pass of the step, error). A step of two micro-batches has two passes of retained, then two of forgotten
data; each failure is in the second."""


class Failure:
    """Raises ``error`` once, in the middle of the model, in the ``number``-th pass from now that records a graph."""

    def __init__(self, module: nn.Module, direction: str, number: int, error: type[BaseException]) -> None:
        self.direction = direction
        self.number = number
        self.error = error
        self.passes = 0
        self.was_raised = False
        self.handle = module.register_forward_hook(self._after_forward)

    def _after_forward(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self.passes += torch.is_grad_enabled()
        if self.passes == self.number:
            if self.direction == "forward":
                self._raise()
            output.register_hook(self._raise)

    def _raise(self, _gradient: Tensor | None = None) -> None:
        self.handle.remove()
        self.was_raised = True
        raise self.error("on purpose")


def denoiser_of(method: EraseDiff) -> nn.Module:
    model: Any = method.model
    return model if hasattr(model, "mid_block") else model.module  # type: ignore[no-any-return]


def fail(method: EraseDiff, step: int, direction: str, number: int, error: type[BaseException]) -> None:
    """Try ``step``, which fails; the caller's exception is the one that was raised."""
    failure = Failure(denoiser_of(method).mid_block, direction, number, error)
    with pytest.raises(error, match="on purpose"):
        method.step(*batches(step, World.current()))
    assert failure.was_raised


def steps(options: dict[str, Any], *, fails: bool) -> dict[str, Any]:
    """The reports of three steps and the weights after them; the first two are tried in vain before, if ``fails``.

    Besides, the engine's and torch's functions that are not what they were before the first step.
    """
    method = unlearner(**{"accumulation": 2, **options})
    before = functions(method)
    reports, changed = [], set()
    for step in range(3):
        for failure in FAILURES if fails and step < 2 else ():
            fail(method, step, *failure)
            changed |= {name for name, value in functions(method).items() if value is not before[name]}
        reports += take_steps(method, range(step, step + 1))
    return {"reports": reports, "weights": dict(full_weights(method.model)), "changed": changed}


def untroubled(options: dict[str, Any]) -> dict[str, Any]:
    return steps(options, fails=False)


def troubled(options: dict[str, Any]) -> dict[str, Any]:
    return steps(options, fails=True)


def functions(method: EraseDiff) -> dict[str, Any]:
    """Functions that a step replaces temporarily, of the engine and its optimizer, and ``functional.linear``."""
    found: dict[str, Any] = {"linear": torch.nn.functional.linear}
    engine: Any = method.model
    for owner in (engine, getattr(engine, "optimizer", None)):
        own = {} if owner is None else vars(owner)
        for name in ("_get_norm_groups", "compute_grad_norm", "check_grad_overflow", "buffered_allreduce_fallback"):
            found[f"{type(owner).__name__}.{name}"] = own.get(name)
        for name in ("process_gradients", "independent_gradient_partition_epilogue", "clip_grad"):
            found[f"{type(owner).__name__}.{name}"] = own.get(name)
    return found

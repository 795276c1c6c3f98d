"""A step that raised is taken again as if it had not been tried."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from erasediff import EraseDiff, Gap, InnerSolve, Process, Threshold
from erasediff.methods import ESD, FineTune, NegativeGradient, SelectiveAmnesia, Solver
from erasediff_kernels import ConstrainedAdamW

Batches = Callable[..., dict[str, Tensor]]


def esd(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> ESD:
    return ESD(
        model,
        optimizer,
        teacher=copy.deepcopy(model).requires_grad_(False).eval(),
        concepts={"class_labels": torch.tensor([1])},
        null={"class_labels": torch.tensor([5])},
        shape=(1, 2, 3),
        batch_size=8,
        num_inference_steps=10,
        latents_from="current",
        **options,
    )


class Denoiser:
    """Runs out of memory in the forward pass of a micro-batch, the n-th that is to have a gradient."""

    calls_until_failure = 0

    def __call__(self, model: nn.Module, sample: Tensor, times: Tensor, condition: dict[str, Tensor]) -> Tensor:
        prediction: Tensor = model(sample, times, **condition)[0]
        if prediction.requires_grad and self.calls_until_failure:
            self.calls_until_failure -= 1
            if not self.calls_until_failure:
                raise torch.OutOfMemoryError("no memory")
        return prediction


METHODS: dict[str, Callable[..., Solver]] = {
    "erasediff": EraseDiff,
    "gap": lambda *args, **options: EraseDiff(*args, barrier=Gap(), inner=InnerSolve(steps=2), **options),
    "threshold": lambda *args, **options: EraseDiff(*args, barrier=Threshold(0.01), **options),
    "esd": esd,
    "finetune": FineTune,
    "neggrad": NegativeGradient,
    "selective-amnesia": SelectiveAmnesia,
}


BOTH_GRADIENTS = [(name, call) for name in ("erasediff", "gap", "threshold", "selective-amnesia") for call in (6, 8)]


@pytest.mark.parametrize(("method", "failing_call"), [(name, 2) for name in METHODS] + BOTH_GRADIENTS + [("gap", 14)])
def test_a_retry_after_running_out_of_memory_is_an_untroubled_step(
    make_model: Callable[[], nn.Module], process: Process, make_batch: Batches, method: str, failing_call: int
) -> None:
    """Whichever micro-batch it was: nothing of its gradients, or of those before it, is left."""
    outcomes = []
    for fails in (False, True):
        model, denoiser = make_model(), Denoiser()
        optimizer = ConstrainedAdamW(model.parameters(), lr=1e-2)
        solver = METHODS[method](model, optimizer, process=process, denoiser=denoiser, accumulation_steps=4)
        solver.step(make_batch(1), make_batch(2))
        if fails:
            denoiser.calls_until_failure = failing_call
            with pytest.raises(torch.OutOfMemoryError):
                solver.step(make_batch(1, seed=1), make_batch(2, seed=1))
        report = solver.step(make_batch(1, seed=1), make_batch(2, seed=1))
        outcomes.append((report.scalars(), [parameter.detach().clone() for parameter in model.parameters()]))
    (scalars, weights), (retried_scalars, retried_weights) = outcomes
    assert all(torch.equal(value, retried_scalars[name]) for name, value in scalars.items())
    assert all(torch.equal(one, other) for one, other in zip(weights, retried_weights, strict=True))

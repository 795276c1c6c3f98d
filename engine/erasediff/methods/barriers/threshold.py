"""A primal-dual multiplier that brings the forget loss to a named level."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from erasediff.methods.barriers.base import Barrier, StepValues, positive


class Threshold(Barrier):
    """Descent-ascent on min over theta, max over lambda >= 0 of L_r + lambda (L_f - level).

    It solves min L_r subject to L_f <= level (Arrow, Hurwicz and Uzawa 1958; of constrained learning, arXiv 2006.05487;
    of unlearning, arXiv 2506.05314):

        delta_t = r + lambda_t g,    lambda_{t+1} = max(0, lambda_t + eta (L_f(theta_t) - level)),    lambda_0 = 0.

    L_f is the distance to the deviated target, so the multiplier grows until forgetting is as deep as asked for, and
    shrinks to nothing where it is deeper. lambda lives on the device, is saved with a run, and is the same on each
    process; a step that is skipped leaves it as it was.

    Args:
        level: of the forget loss, positive: the largest that counts as forgotten.
        eta: the dual step size, positive.

    Raises:
        ValueError: for a level or an eta that is not positive.
    """

    name: ClassVar[str] = "threshold"

    def __init__(self, level: float, eta: float = 0.1) -> None:
        positive("level", level)
        positive("eta", eta)
        self.level = level
        self.eta = eta
        self.multiplier = torch.zeros((), dtype=torch.float64)
        """lambda, 0-D float64; on the device of the Gram values from the first step on."""

    def coefficients(self, values: StepValues) -> tuple[Tensor, Tensor]:
        """(1, lambda_t)."""
        one = torch.ones_like(values.gram[0])
        return one, one * self._on(one.device)

    def advance(self, values: StepValues, finite: Tensor) -> None:
        """lambda_{t+1}."""
        assert values.forget_loss is not None
        multiplier = self._on(finite.device)
        excess = values.forget_loss.double() - self.level
        self.multiplier = torch.where(finite, (multiplier + self.eta * excess).clamp_min(0), multiplier)

    def scalars(self) -> dict[str, Tensor]:
        return {"multiplier": self.multiplier}

    def load_scalars(self, scalars: Mapping[str, Tensor]) -> None:
        self.multiplier = scalars["multiplier"].double()

    def _on(self, device: torch.device) -> Tensor:
        """The multiplier on ``device``, moved there once: a copy makes the host wait."""
        if self.multiplier.device != device:
            self.multiplier = self.multiplier.to(device)
        return self.multiplier

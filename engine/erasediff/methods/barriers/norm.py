"""The norm barrier: descent on the forget loss of at least eta |g|^2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from erasediff.methods.barriers.base import FusedBarrier, StepValues, positive


@dataclass(frozen=True, slots=True)
class Norm(FusedBarrier):
    """lambda = max(0, eta - <r,g> / |g|^2): Theorem 3.1 of arXiv 2401.05779 with a_t = eta |g|^2.

    Theorem 3.1: delta = r + lambda g, lambda = max(0, (a_t - <r,g>) / |g|^2), is the vector nearest to r with
    <delta,g> >= a_t. grad g = grad L_f whatever the inner solve finds, and a_t does not depend on it either, so it is
    never run.

    Attributes:
        eta: positive.

    Raises:
        ValueError: for an eta that is not positive.
    """

    eta: float = 0.1
    name: ClassVar[str] = "norm"

    def __post_init__(self) -> None:
        positive("eta", self.eta)

    def coefficients(self, values: StepValues) -> tuple[Tensor, Tensor]:
        """(1, lambda); lambda is 0 where g is."""
        _, rf, ff = values.gram.unbind()
        multiplier = (self.eta - rf / torch.where(ff == 0, 1.0, ff)).clamp_min(0)
        return torch.ones_like(ff), torch.where(ff == 0, 0.0, multiplier)

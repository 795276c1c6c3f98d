"""The gap barrier: descent on the forget loss in proportion to what is left of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from erasediff.methods.barriers.base import FusedBarrier, StepValues, positive


@dataclass(frozen=True, slots=True)
class Gap(FusedBarrier):
    """lambda = max(0, (eta max(L_f(theta) - L_f(phi_K), 0) - <r,g>) / |g|^2), phi_K from K steps on L_f.

    Theorem 3.1 of arXiv 2401.05779 with a_t = eta times the value function's gap, as BOME has it (arXiv 2209.08709):
    the descent that is asked for fades as the constraint is met.

    Attributes:
        eta: positive.

    Raises:
        ValueError: for an eta that is not positive.
    """

    eta: float = 0.1
    name: ClassVar[str] = "gap"
    needs_inner_solve: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("eta", self.eta)

    def coefficients(self, values: StepValues) -> tuple[Tensor, Tensor]:
        """(1, lambda); lambda is 0 where g is."""
        assert values.gap is not None
        _, rf, ff = values.gram.unbind()
        descent = self.eta * values.gap.double().clamp_min(0)
        multiplier = ((descent - rf) / torch.where(ff == 0, 1.0, ff)).clamp_min(0)
        return torch.ones_like(ff), torch.where(ff == 0, 0.0, multiplier)

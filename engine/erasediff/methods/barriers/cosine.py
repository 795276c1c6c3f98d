"""The multiplier of EraseDiff's published code, which divides by both norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from erasediff.methods.barriers.base import FusedBarrier, StepValues, positive


@dataclass(frozen=True, slots=True)
class Cosine(FusedBarrier):
    """lambda = max(0, eta - cos(r, g)), for parity with the published code.

    Equal to ``Norm`` where |r| = |g|; otherwise it does not hold <delta,g> >= eta |g|^2.

    Attributes:
        eta: positive.

    Raises:
        ValueError: for an eta that is not positive.
    """

    eta: float = 0.1
    name: ClassVar[str] = "cosine"

    def __post_init__(self) -> None:
        positive("eta", self.eta)

    def coefficients(self, values: StepValues) -> tuple[Tensor, Tensor]:
        """(1, lambda); lambda is 0 where g is."""
        rr, rf, ff = values.gram.unbind()
        product = rr * ff
        multiplier = (self.eta - rf / torch.where(product == 0, 1.0, product).sqrt()).clamp_min(0)
        return torch.ones_like(ff), torch.where(ff == 0, 0.0, multiplier)

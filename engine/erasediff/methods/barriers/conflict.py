"""Gradient surgery: each gradient loses what opposes the other, only where they conflict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from erasediff.methods.barriers.base import Barrier, StepValues, positive


@dataclass(frozen=True, slots=True)
class Conflict(Barrier):
    """PCGrad (Yu et al. 2020, arXiv 2001.06782, Algorithm 1) on L_r and eta L_f.

    Where <r,g> < 0 each is projected onto the normal plane of the other: r' = r - <r,g>/|g|^2 g and
    g' = g - <r,g>/|r|^2 r; elsewhere both stay. delta = r' + eta g', which is a r + b g with

        a = 1 - eta min(<r,g>, 0) / |r|^2,    b = eta - min(<r,g>, 0) / |g|^2.

    With two losses the order of projections, random in the paper, makes no difference. Neither loss rises to first
    order, <delta,r> >= 0 and <delta,g> >= 0, unless eta weighs the gain of one without a conflict.

    Attributes:
        eta: the weight of the forget loss, positive.

    Raises:
        ValueError: for an eta that is not positive.
    """

    eta: float = 1.0
    name: ClassVar[str] = "conflict"

    def __post_init__(self) -> None:
        positive("eta", self.eta)

    def coefficients(self, values: StepValues) -> tuple[Tensor, Tensor]:
        """(a, b); a >= 1 and b >= eta."""
        rr, rf, ff = values.gram.unbind()
        # A conflict implies that neither gradient is zero.
        opposed = rf.clamp_max(0)
        retain = 1 - self.eta * opposed / torch.where(opposed < 0, rr, 1.0)
        return retain, self.eta - opposed / torch.where(opposed < 0, ff, 1.0)

"""Nash bargaining between the retain and the forget loss (MUNBa, arXiv 2411.15537)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from erasediff.methods.barriers.base import Barrier, StepValues

STATIONARY = 1e-12
"""1 + cos(r, g) below this is opposition up to the rounding of float64 Gram values."""


@dataclass(frozen=True, slots=True)
class Nash(Barrier):
    """The direction that maximises log <r,delta> + log <g,delta> over a ball: each loss falls by the same share.

    delta = a r + b g with G alpha = 1 / alpha, alpha = (a, b), G the Gram matrix (MUNBa, arXiv 2411.15537, after
    Nash-MTL, arXiv 2202.01017). For two players the solution is closed:

        a = 1 / (|r| sqrt(1 + cos)),    b = 1 / (|g| sqrt(1 + cos)),    cos = <r,g> / (|r| |g|),

    so <r,delta> / |r| = <g,delta> / |g| and |delta|^2 = 2 always: neither the larger gradient nor the larger loss
    dominates. Where r and g are opposed (cos = -1) no direction lets both losses fall, the weights are Pareto
    stationary, and no step is taken; there the published code falls back on a fixed multiplier. Where a gradient is
    zero its loss has nothing to bargain for, and delta is the other, normalised.
    """

    name: ClassVar[str] = "nash"

    def coefficients(self, values: StepValues) -> tuple[Tensor, Tensor]:
        """(a, b); both 0 at a Pareto stationary point."""
        rr, rf, ff = values.gram.unbind()
        has_retain, has_forget = rr > 0, ff > 0
        both = has_retain & has_forget
        r, g = torch.where(has_retain, rr, 1.0).sqrt(), torch.where(has_forget, ff, 1.0).sqrt()
        # 0 where either is zero: then each is normalised alone.
        gain = 1 + torch.where(both, rf, 0.0) / (r * g)
        scale = torch.where(gain > STATIONARY, gain, 1.0).rsqrt() * (gain > STATIONARY)
        forget = torch.where(has_forget, scale / g, 0.0)
        # The retain coefficient of r = 0 is free; that of g keeps the multiplier b / a finite.
        return torch.where(has_retain, scale / r, torch.where(has_forget, forget, 1.0)), forget

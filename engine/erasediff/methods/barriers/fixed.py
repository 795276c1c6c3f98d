"""A constant multiplier: the weighted sum of both losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from erasediff.methods.barriers.base import FusedBarrier, StepValues


@dataclass(frozen=True, slots=True)
class Fixed(FusedBarrier):
    """delta = r + multiplier g, as in the published Stable Diffusion recipes of EraseDiff (1.0).

    Attributes:
        multiplier: not negative.

    Raises:
        ValueError: for a negative multiplier, which would ascend on the forget loss.
    """

    multiplier: float = 1.0
    name: ClassVar[str] = "fixed"

    def __post_init__(self) -> None:
        if self.multiplier < 0:
            raise ValueError(
                f"multiplier must not be negative (it would ascend on the forget loss), got {self.multiplier}"
            )

    @property
    def eta(self) -> float:
        """The multiplier, by the name that the kernel has for it."""
        return self.multiplier

    def coefficients(self, values: StepValues) -> tuple[Tensor, Tensor]:
        """(1, multiplier)."""
        one = torch.ones_like(values.gram[0])
        return one, self.multiplier * one

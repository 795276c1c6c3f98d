"""Learning-rate schedules as functions of the step alone, so that a resumed run needs no state for them."""

import math
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, slots=True)
class LearningRate:
    """Linear warm-up, then constant or cosine decay.

    Attributes:
        peak: Rate after the warm-up.
        steps: Step at which the cosine reaches zero.
        warmup_steps: Steps of the linear warm-up.
        shape: Shape after the warm-up.
    """

    peak: float
    steps: int
    warmup_steps: int = 0
    shape: Literal["constant", "cosine"] = "constant"

    def at(self, step: int) -> float:
        """Learning rate of ``step``, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.shape == "constant":
            return self.peak
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.peak * 0.5 * (1 + math.cos(math.pi * progress))

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set every parameter group to the rate of ``step``."""
        for group in optimizer.param_groups:
            group["lr"] = self.at(step)

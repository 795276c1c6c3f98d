"""Rounds of a run that goes on until its goal is reached: each is as long as the first, at twice its learning rate."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from erasediff.training.lr_schedule import LearningRate

GROWTH = 2.0
"""Learning rate of a round over that of the one before."""


class Rounds(Protocol):
    """Decision whether a run goes on, at the end of each round."""

    @property
    def max_steps(self) -> int:
        """Steps that the run takes at most, a multiple of a round's."""

    def goes_on(self, step: int) -> bool:
        """Whether another round follows after ``step`` steps; a collective, a function of the weights and the step."""


def rate_of_round(rate: LearningRate, step: int) -> tuple[LearningRate, int]:
    """Schedule of the round of ``step``, counted from 0, and the step within it."""
    number, within = divmod(step, rate.steps)
    return (rate if number == 0 else replace(rate, peak=rate.peak * GROWTH**number)), within


def end_of_round(step: int, steps: int) -> int:
    """Steps of the whole run at the end of the round that a run is in, or ends, after ``step`` steps."""
    return max(-(-step // steps), 1) * steps

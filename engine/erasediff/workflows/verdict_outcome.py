"""An examination: a verdict with what it rests on; the time that it may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from erasediff.config import Config
from erasediff.verdict.outcome import Verdict

BACKWARD = 3
"""Cost of a forward and backward pass in forward passes."""


@dataclass(frozen=True, slots=True)
class Examination:
    """A verdict with what it rests on.

    Attributes:
        verdict: The verdict.
        rows: A record for each image and judge.
        images: By model ("before", "after") and label, uint8 [n, C, H, W].
        sought: Labels of ``images`` of what is forgotten.
        retained: Labels of those of what is retained.
    """

    verdict: Verdict
    rows: Sequence[Mapping[str, Any]]
    images: Mapping[str, Mapping[str, Tensor]]
    sought: Sequence[str] = ()
    retained: Sequence[str] = ()


def undecided(kind: str, reason: str) -> Examination:
    """An examination that cannot tell, with the reason in a sentence."""
    return Examination(Verdict(forgotten="cannot tell", retained="cannot tell", kind=kind, reasons=(reason,)), (), {})


def affordable_passes(config: Config) -> float:
    """Forward passes of one sample that take a quarter of the run's time."""
    settings = config.unlearn
    of_step = 2 * settings.batch_size * BACKWARD + 2 * settings.batch_size
    return (settings.steps or 0) * of_step / 4

"""Intervals of shares and means, at 95%."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

Z95 = 1.959963984540054
"""Quantile 0.975 of the normal distribution."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimate of a quantity, with its 95% interval.

    Attributes:
        value: The estimate; nan for none.
        low: Lower end of the interval.
        high: Upper end of the interval.
        count: Number of observations.
    """

    value: float
    low: float
    high: float
    count: int

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON, numbers that are not finite to None."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


def share(hits: int, count: int) -> Estimate:
    """Share of ``hits`` among ``count`` observations, with Wilson's interval (1927); [0, 1] for none.

    Raises:
        ValueError: More hits than observations, or fewer than none.
    """
    if not 0 <= hits <= count:
        raise ValueError(f"{hits} hits of {count}")
    if count == 0:
        return Estimate(math.nan, 0.0, 1.0, 0)
    value, square = hits / count, Z95**2
    centre = (value + square / (2 * count)) / (1 + square / count)
    half = Z95 * math.sqrt(value * (1 - value) / count + square / (4 * count**2)) / (1 + square / count)
    return Estimate(value, max(centre - half, 0.0), min(centre + half, 1.0), count)


def mean(values: Sequence[float]) -> Estimate:
    """Mean of ``values`` with Student's interval; infinite for fewer than two."""
    from scipy.stats import t

    count = len(values)
    if count == 0:
        return Estimate(math.nan, -math.inf, math.inf, 0)
    value = math.fsum(values) / count
    if count == 1:
        return Estimate(value, -math.inf, math.inf, 1)
    deviation = math.sqrt(math.fsum((v - value) ** 2 for v in values) / (count - 1))
    half = float(t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    return Estimate(value, value - half, value + half, count)

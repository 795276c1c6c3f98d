"""Intervals of shares, means and areas under the curve, at 95%."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from erasediff.evaluation.memorization import membership_auc

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


def share_ratio(hits: int, hits_before: int, count: int) -> Estimate:
    """Quotient of the shares of ``hits`` and ``hits_before``, each of ``count`` observations, with its interval.

    The interval is that of Katz et al. (1978) with half a hit added to each count (Walter 1975); nan and [0, inf) where
    nothing was hit before.

    Raises:
        ValueError: More hits than observations, or fewer than none.
    """
    if not (0 <= hits <= count and 0 <= hits_before <= count):
        raise ValueError(f"{hits} and {hits_before} hits of {count}")
    if hits_before == 0:
        return Estimate(math.nan, 0.0, math.inf, count)
    centre = math.log((hits + 0.5) / (hits_before + 0.5))
    half = Z95 * math.sqrt(1 / (hits + 0.5) + 1 / (hits_before + 0.5) - 2 / (count + 0.5))
    value = hits / hits_before
    return Estimate(value, min(math.exp(centre - half), value) if hits else 0.0, math.exp(centre + half), count)


def share_difference(hits: int, count: int, hits_before: int, count_before: int) -> Estimate:
    """Absolute difference of two shares, with Wald's interval cut off at 0; nan and [0, 1] where a count is 0."""
    if not count or not count_before:
        return Estimate(math.nan, 0.0, 1.0, min(count, count_before))
    p, q = hits / count, hits_before / count_before
    half, value = Z95 * math.sqrt(p * (1 - p) / count + q * (1 - q) / count_before), abs(p - q)
    return Estimate(value, max(value - half, 0.0), min(value + half, 1.0), min(count, count_before))


def area_under_curve(members: Tensor, others: Tensor) -> Estimate:
    """AUC of losses of members [M] and non-members [N], with the interval of Hanley & McNeil (1982).

    See ``membership_auc``.
    """
    auc, m, n = membership_auc(members, others), len(members), len(others)
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = (auc * (1 - auc) + (m - 1) * (q1 - auc**2) + (n - 1) * (q2 - auc**2)) / (m * n)
    half = Z95 * math.sqrt(max(variance, 0.0))
    return Estimate(auc, max(auc - half, 0.0), min(auc + half, 1.0), m + n)

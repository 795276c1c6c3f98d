import math

import pytest
from scipy.stats import binomtest

from erasediff.verdict.statistics import mean, share


@pytest.mark.parametrize(("hits", "count"), [(0, 20), (20, 20), (3, 50), (1, 2)])
def test_shares_have_wilsons_interval(hits: int, count: int) -> None:
    expected = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    found = share(hits, count)
    assert (found.value, found.count) == (hits / count, count)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_means_have_students_interval() -> None:
    # t(0.975, 3 degrees of freedom) = 3.182446, standard error of 1, 2, 3, 4: 0.6454972.
    found = mean([1.0, 2.0, 3.0, 4.0])
    assert (found.value, found.high - found.value) == pytest.approx((2.5, 2.054260), rel=1e-6)


def test_nothing_observed_tells_nothing() -> None:
    nothing = share(0, 0)
    assert math.isnan(nothing.value)
    assert (nothing.low, nothing.high) == (0, 1)
    assert mean([1.0]).to_dict() == {"value": 1.0, "low": None, "high": None, "count": 1}

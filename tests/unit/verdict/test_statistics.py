import math

import pytest
import torch
from scipy.stats import binomtest

from erasediff.verdict.statistics import area_under_curve, mean, share, share_difference, share_ratio


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


def test_quotients_of_shares_have_katzs_interval() -> None:
    found = share_ratio(20, 40, 100)
    # log(20.5 / 40.5) with the standard error (1/20.5 + 1/40.5 - 2/100.5)^(1/2) = 0.231455
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.321576, 0.796734), rel=1e-5)
    assert share_ratio(0, 40, 100).low == share_ratio(0, 40, 100).value == 0
    assert share_ratio(0, 40, 100).high < 0.25
    assert math.isnan(share_ratio(3, 0, 100).value)


def test_differences_of_shares_have_walds_interval() -> None:
    found = share_difference(30, 100, 50, 100)
    assert (found.value, found.high - found.value) == pytest.approx((0.2, 1.96 * math.sqrt(0.0046)), rel=1e-4)
    assert share_difference(30, 100, 30, 100).low == 0
    assert math.isnan(share_difference(0, 0, 1, 2).value)


def test_the_area_under_the_curve_covers_its_truth_at_95_percent() -> None:
    generator = torch.Generator().manual_seed(0)
    # Losses of normal distributions one apart: the AUC is the normal distribution's value at 2^-1/2.
    truth = 0.5 * (1 + math.erf(0.5))
    estimates = [
        area_under_curve(torch.randn(40, generator=generator) - 1, torch.randn(50, generator=generator))
        for _ in range(400)
    ]
    assert 0.92 < sum(e.low <= truth <= e.high for e in estimates) / len(estimates) < 0.985
    assert (area_under_curve(torch.zeros(3), torch.ones(3)).value, estimates[0].count) == (1.0, 90)

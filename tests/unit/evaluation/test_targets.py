"""Targets of the metrics of a demo."""

from dataclasses import replace

import pytest

from erasediff.evaluation import ConditionalMetrics, UnconditionalMetrics
from erasediff.evaluation.metrics import conditional_targets, unconditional_targets

BASE = ConditionalMetrics(
    recognised=(1.0, 1.0, 0.9),
    asked=(100, 100, 100),
    forgotten_rate=1.0,
    forgotten_bound=1.0,
    forgotten_nearest=1.0,
    forgotten_none=0.0,
    forgotten_elsewhere=0.0,
    retained_mean=0.95,
    retained_worst=0.9,
    discrepancy=0.0,
    forget=(0,),
)


@pytest.mark.parametrize(
    ("recognised", "met"),
    [
        ((0.02, 0.99, 0.95), [True, True, True]),
        ((0.03, 0.99, 0.95), [False, True, True]),
        ((0.0, 0.96, 0.92), [True, False, False]),
    ],
)
def test_conditional_goals(recognised: tuple[float, ...], met: list[bool]) -> None:
    metrics = replace(BASE, recognised=recognised, forgotten_rate=recognised[0], retained_mean=sum(recognised[1:]) / 2)
    assert [target.is_met for target in conditional_targets(metrics, BASE)] == met


def test_unconditional_goals() -> None:
    base = UnconditionalMetrics(
        shares=(0.2, 0.4, 0.4),
        none=0.0,
        count=100,
        forgotten_share=0.2,
        forgotten_bound=0.3,
        forgotten_nearest=0.2,
        proportions=(0.0, 0.5, 0.5),
        discrepancy=0.0,
        forget=(0,),
    )
    done = replace(base, forgotten_share=0.04, proportions=(0.0, 0.53, 0.47))
    shifted = replace(base, forgotten_share=0.05, proportions=(0.0, 0.6, 0.4))
    assert [target.is_met for target in unconditional_targets(done, base)] == [True, True]
    assert [target.is_met for target in unconditional_targets(shifted, base)] == [False, False]

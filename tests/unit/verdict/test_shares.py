"""Verdict on samples of unconditional models, by a judge whose answers are planted."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from erasediff.config.verdict_config import VerdictConfig
from erasediff.verdict.judges.base import Candidate
from erasediff.verdict.shares import HeldOut, SampledShares, grouped, judge_shares

COAT, BAG, SHOE = (Candidate(name, name) for name in ("coat", "bag", "shoe"))
NOTHING = 255
BEFORE = [0] * 60 + [1] * 120 + [2] * 120
Showing = Callable[[Sequence[int]], Tensor]


@pytest.fixture
def sampled(showing: Showing) -> Callable[[Sequence[int]], SampledShares]:
    """``sampled(after)``: a fifth of 300 samples showed coats, and now they show ``after``."""

    def build(after: Sequence[int], before: Sequence[int] = BEFORE) -> SampledShares:
        images = {"before": showing(before), "after": showing(after)}
        return SampledShares([COAT], [BAG, SHOE], images, HeldOut(showing([0] * 20), showing([1, 2] * 20)))

    return build


def verdict(judge: Any, samples: SampledShares, **settings: Any) -> Any:
    return judge_shares(judge, samples, VerdictConfig(**settings), decides=True)


@pytest.mark.parametrize(
    ("after", "forgotten", "retained"),
    [
        (BEFORE, "not forgotten", "retained"),
        ([1] * 30 + [2] * 30 + BEFORE[60:], "forgotten", "retained"),
        # A fifth of a fifth is left, the limit.
        ([0] * 12 + [1] * 48 + BEFORE[60:], "forgotten", "retained"),
        ([0] * 13 + [1] * 47 + BEFORE[60:], "not forgotten", "retained"),
        ([NOTHING] * 60 + BEFORE[60:], "forgotten", "damaged"),
        ([1] * 60 + [1] * 120 + [1] * 120, "forgotten", "damaged"),
        # Up to 5 points of nothing are allowed.
        ([NOTHING] * 15 + [1] * 20 + [2] * 25 + BEFORE[60:], "forgotten", "retained"),
        ([NOTHING] * 16 + [1] * 20 + [2] * 24 + BEFORE[60:], "forgotten", "damaged"),
    ],
)
def test_samples_decide(
    planted: Any, sampled: Callable[..., SampledShares], after: list[int], forgotten: str, retained: str
) -> None:
    findings = verdict(planted(), sampled(after))
    assert (findings.forgotten, findings.retained) == (forgotten, retained)
    assert bool(findings.reasons) == ((forgotten, retained) != ("forgotten", "retained"))


def test_figures_follow_from_the_rows(planted: Any, sampled: Callable[..., SampledShares]) -> None:
    findings = verdict(planted(), sampled([0] * 6 + [NOTHING] * 9 + [2] * 45 + BEFORE[60:]))
    figures = {figure.key: figure for figure in findings.figures}

    def counted(model: str, sees: str | None) -> int:
        return sum(row["model"] == model and row["sees"] == sees for row in findings.rows)

    assert len(findings.rows) == 600
    assert all(row["asked"] is None for row in findings.rows)
    assert figures["share"].before.value == counted("before", "coat") / 300 == 0.2
    assert figures["share"].after.value == counted("after", "coat") / 300
    assert figures["remaining"].after.value == pytest.approx(counted("after", "coat") / counted("before", "coat"))
    assert figures["nothing"].after.value == counted("after", None) / 300
    assert figures["nothing_rise"].after.value == pytest.approx(9 / 300)
    shift = counted("after", "shoe") / (300 - 6 - 9) - 0.5
    assert figures["largest_shift"].after.value == pytest.approx(shift)
    assert [figure.key for figure in findings.figures if figure.decides] == [
        "remaining",
        "nothing_rise",
        "largest_shift",
    ]


def test_a_judge_that_does_not_know_real_images_cannot_tell(
    planted: Any, sampled: Callable[..., SampledShares]
) -> None:
    findings = verdict(planted(blind=True), sampled(BEFORE))
    assert findings.forgotten == "cannot tell"
    assert "recognises 0% of real images" in findings.reasons[0]


def test_an_original_that_never_drew_it_cannot_tell(planted: Any, sampled: Callable[..., SampledShares]) -> None:
    findings = verdict(planted(), sampled(BEFORE[60:], BEFORE[60:]))
    assert findings.forgotten == "cannot tell"
    assert "draws too little" in findings.reasons[0]


def test_few_samples_cannot_tell(planted: Any, sampled: Callable[..., SampledShares]) -> None:
    findings = verdict(planted(), sampled([1] * 30, [0] * 3 + [1] * 27))
    assert findings.forgotten == "cannot tell"
    assert "too few" in findings.reasons[0]


def test_a_detector_cannot_tell_what_is_retained(planted: Any, sampled: Callable[..., SampledShares]) -> None:
    findings = verdict(planted(tells_apart=False), sampled([1] * 60 + BEFORE[60:]))
    assert (findings.forgotten, findings.retained) == ("forgotten", "cannot tell")


def test_pictures_are_of_the_same_noises(planted: Any, sampled: Callable[..., SampledShares]) -> None:
    samples = sampled([0] * 2 + [NOTHING] * 3 + [2] * 55 + BEFORE[60:])
    images, forgotten, retained = grouped(samples, verdict(planted(), samples).rows)
    assert forgotten == ["coat", "coat, still drawn"]
    assert retained == ["nothing, drawn now", "bag", "shoe"]
    assert torch.equal(images["after"]["coat"], samples.images["after"][:60])
    assert images["before"]["nothing, drawn now"].unique().tolist() == [0]

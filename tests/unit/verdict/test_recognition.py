"""Verdict on images of captions and classes, by a judge whose answers are planted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor

from erasediff.config.verdict_config import VerdictConfig
from erasediff.verdict.judges.base import Candidate
from erasediff.verdict.outcome import DAMAGED, NOT_FORGOTTEN, UNPROVEN
from erasediff.verdict.recognition import Drawn, concluded, judge_images

COAT, BAG, SHOE = (Candidate(name, name) for name in ("coat", "bag", "shoe"))
NOTHING = 255
Showing = Callable[[Sequence[int]], Tensor]


@pytest.fixture
def drawn(showing: Showing) -> Callable[..., Drawn]:
    """Twenty images of each candidate, those of the original as they were asked for."""

    def build(coat: Sequence[int], bag: Sequence[int] = (1,) * 20, before: Sequence[int] = (0,) * 20) -> Drawn:
        shoes = showing([2] * 20)
        images = {
            "before": {"coat": showing(before), "bag": showing([1] * 20), "shoe": shoes},
            "after": {"coat": showing(coat), "bag": showing(bag), "shoe": shoes},
        }
        return Drawn([COAT], [BAG, SHOE], [], images)

    return build


@pytest.mark.parametrize(
    ("coat", "bag", "name"),
    [
        ([0] * 20, [1] * 20, NOT_FORGOTTEN),
        ([1] * 20, [1] * 20, None),
        # One in ten is the limit.
        ([0] * 2 + [NOTHING] * 18, [1] * 20, None),
        ([0] * 3 + [NOTHING] * 17, [1] * 20, NOT_FORGOTTEN),
        # A drop of a tenth in one class is one of a twentieth in the mean.
        ([1] * 20, [1] * 18 + [2] * 2, None),
        ([1] * 20, [1] * 17 + [2] * 3, DAMAGED),
        ([NOTHING] * 20, [NOTHING] * 20, DAMAGED),
    ],
)
def test_images_decide_and_name_the_model(
    planted: Any, drawn: Callable[..., Drawn], coat: list[int], bag: list[int], name: str | None
) -> None:
    findings = judge_images(planted(), drawn(coat, bag), VerdictConfig(), decides=True)
    verdict = concluded([findings], [], kind="concept")
    assert (None if verdict.passed else verdict.failed_name) == name
    assert bool(verdict.reasons) == (name is not None)


def test_shares_follow_from_the_rows(planted: Any, drawn: Callable[..., Drawn]) -> None:
    findings = judge_images(
        planted(), drawn([0] * 5 + [NOTHING] * 15, [1] * 10 + [2] * 10), VerdictConfig(), decides=True
    )
    figures = {figure.key: figure for figure in findings.figures}

    def counted(model: str, asked: str) -> float:
        rows = [row for row in findings.rows if (row["model"], row["asked"]) == (model, asked)]
        assert [row["image"] for row in rows] == list(range(20))
        return sum(row["sees"] == asked for row in rows) / 20

    assert figures["recognised"].before.value == counted("before", "coat") == 1
    assert figures["recognised"].after.value == counted("after", "coat") == 0.25
    assert figures["worst_drop"].after.value == counted("before", "bag") - counted("after", "bag") == 0.5
    assert figures["retained_drop"].after.value == 0.25
    assert figures["retained"].after.value == 0.75


def test_a_judge_that_sees_nothing_in_the_original_cannot_tell(planted: Any, drawn: Callable[..., Drawn]) -> None:
    findings = judge_images(planted(), drawn([1] * 20, before=[0] * 9 + [1] * 11), VerdictConfig(), decides=True)
    assert findings.forgotten == "cannot tell"
    assert "in 45% of the original model's own images" in findings.reasons[0]
    assert concluded([findings], [], kind="concept").failed_name == UNPROVEN


def test_a_detector_and_a_request_without_retained_prompts_cannot_tell_the_rest(
    planted: Any, drawn: Callable[..., Drawn]
) -> None:
    images = drawn([1] * 20)
    detector = judge_images(planted(tells_apart=False), images, VerdictConfig(), decides=True)
    alone = judge_images(planted(), Drawn([COAT], [], [BAG], images.images), VerdictConfig(), decides=True)
    for findings in (detector, alone):
        assert (findings.forgotten, findings.retained) == ("forgotten", "cannot tell")
    assert "--retain-prompts" in alone.reasons[0]


def test_the_first_judge_decides_and_the_others_are_beside_it(planted: Any, drawn: Callable[..., Drawn]) -> None:
    images = drawn([1] * 20)
    settings = VerdictConfig()
    findings = [judge_images(planted(blind=blind), images, settings, decides=not blind) for blind in (False, True)]
    verdict = concluded(findings, [], kind="concept")
    assert verdict.passed
    assert sum(figure.key == "recognised" for figure in verdict.figures) == 2
    assert not concluded(findings[::-1], [], kind="concept").passed

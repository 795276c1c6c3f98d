"""Verdict on listed files: reproduction and losses of planted models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from erasediff.config.verdict_config import VerdictConfig
from erasediff.verdict.files import FileEvidence, judge_files, reproduced

N = 60


def losses(level: float) -> Tensor:
    return level * (1 + 0.1 * torch.randn(N, generator=torch.Generator().manual_seed(int(1000 * level))))


@pytest.fixture
def evidence() -> Callable[..., FileEvidence]:
    """Evidence of an original that reproduces ``before`` of 60 draws, and whose loss of what it saw is ``seen``."""

    def build(
        before: int = 0, after: int = 0, *, seen: float = 1.0, forgotten: float = 1.0, retained: float = 1.0,
        unseen: bool = False,
    ) -> FileEvidence:  # fmt: skip
        sets = {"forgotten": seen, "retained": seen, **({"unseen": 1.0} if unseen else {})}
        original = {name: losses(level) for name, level in sets.items()}
        rises = {"forgotten": forgotten, "retained": retained, "unseen": 1.0}
        return FileEvidence(
            {
                model: torch.where(torch.arange(N) < hits, torch.arange(N) % 3, -1)
                for model, hits in (("before", before), ("after", after))
            },
            ["a coat"] * N,
            ["a.png", "b.png", "c.png"],
            {"before": original, "after": {name: value * rises[name] for name, value in original.items()}},
            {name: [f"{name}-{number}" for number in range(N)] for name in sets},
        )

    return build


@pytest.mark.parametrize(
    ("changes", "forgotten", "retained"),
    [
        ({"before": 30, "after": 30}, "not forgotten", "retained"),
        ({"before": 30, "after": 2}, "forgotten", "retained"),
        ({"before": 30, "after": 2, "retained": 1.2}, "forgotten", "damaged"),
        ({"seen": 0.7, "unseen": True}, "not forgotten", "retained"),
        ({"seen": 0.7, "unseen": True, "forgotten": 1.45}, "forgotten", "retained"),
        # One test is passed and the other is not.
        ({"before": 30, "after": 0, "seen": 0.7, "unseen": True}, "not forgotten", "retained"),
        ({"before": 30, "after": 30, "seen": 0.7, "unseen": True, "forgotten": 1.45}, "not forgotten", "retained"),
    ],
)
def test_what_the_original_knows_decides(
    evidence: Callable[..., FileEvidence], changes: dict[str, Any], forgotten: str, retained: str
) -> None:
    findings = judge_files(evidence(**changes), VerdictConfig())
    assert (findings.forgotten, findings.retained) == (forgotten, retained)
    assert bool(findings.reasons) == ((forgotten, retained) != ("forgotten", "retained"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        # Losses of images that both models saw say nothing, however far they are apart.
        ({"forgotten": 3.0}, "--unseen-data"),
        ({"unseen": True}, "nor tells them from unseen ones"),
        ({"before": 1, "after": 0}, "too few"),
    ],
)
def test_an_original_that_shows_nothing_of_them_cannot_tell(
    evidence: Callable[..., FileEvidence], changes: dict[str, Any], reason: str
) -> None:
    findings = judge_files(evidence(**changes), VerdictConfig())
    assert findings.forgotten == "cannot tell"
    assert reason in " ".join(findings.reasons)
    assert findings.retained == "retained"


def test_figures_follow_from_the_rows(evidence: Callable[..., FileEvidence]) -> None:
    findings = judge_files(evidence(30, 3, seen=0.7, unseen=True), VerdictConfig())
    figures = {figure.key: figure for figure in findings.figures}
    draws = [row for row in findings.rows if row["judge"] == "reproduction" and row["model"] == "after"]
    assert sum(row["sees"] is not None for row in draws) / len(draws) == figures["reproduced"].after.value == 0.05

    def values(name: str) -> list[float]:
        return [row["loss"] for row in findings.rows if (row.get("set"), row["model"]) == (name, "before")]

    lower = [a < b for a in values("forgotten") for b in values("unseen")]
    assert sum(lower) / len(lower) == pytest.approx(figures["auc_unseen"].before.value)


def test_copies_of_images_to_forget_are_found_and_of_others_are_not() -> None:
    training = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    drawn = torch.cat([training[[4, 20]] + 0.01, torch.randn(1, 8, generator=torch.Generator().manual_seed(1)) * 9])
    assert reproduced([drawn, 2 * drawn], [training, 2 * training], 10).tolist() == [4, -1, -1]
    # One view in which it is another image's copy.
    assert reproduced([drawn, drawn.roll(1, 0)], [training, training], 10).tolist() == [-1, -1, -1]

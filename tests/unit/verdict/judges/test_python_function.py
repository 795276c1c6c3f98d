"""Judges that are Python functions of the user."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from erasediff.errors import UserError
from erasediff.verdict.judges.base import Candidate
from erasediff.verdict.judges.registry import judge_named

SOURCE = """
import numpy as np
def brightest(images, labels):
    assert images.dtype == np.uint8 and images.ndim == 4 and labels == ["red", "green", "blue"]
    return images.mean((2, 3)).argmax(1)
class by:
    name = staticmethod(lambda images, labels: [labels[2], None, "red"])
def broken(images, labels):
    raise KeyError("red")
def short(images, labels):
    return [0]
def far(images, labels):
    return [0, 3, 0]
def other(images, labels):
    return ["red", "orange", "red"]
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "colour_judge.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)


def ask(name: str, candidates: list[Candidate], images: Tensor) -> Any:
    return judge_named(f"colour_judge:{name}").answers(images, candidates[:1], candidates[1:]).tolist()


def test_indices_and_labels_are_answers(candidates: list[Candidate], plain_images: Tensor) -> None:
    assert ask("brightest", candidates, plain_images) == [0, 1, 2]
    assert ask("by.name", candidates, plain_images) == [2, -1, 0]


@pytest.mark.parametrize(
    ("name", "told"),
    [("broken", "KeyError"), ("short", "1 answers for 3"), ("far", "'3'.*0 to 2"), ("other", "'orange'")],
)
def test_wrong_answers_are_refused(name: str, told: str, candidates: list[Candidate], plain_images: Tensor) -> None:
    with pytest.raises(UserError, match=told):
        ask(name, candidates, plain_images)


def test_the_file_is_described_by_its_hash() -> None:
    judge = judge_named("colour_judge:brightest")
    assert judge.name == "colour_judge:brightest"
    assert len(judge.description["sha256"]["colour_judge.py"]) == 64


@pytest.mark.parametrize("reference", ["no_such_module:f", "colour_judge:absent", "colour_judge:by.absent"])
def test_what_cannot_be_imported_is_refused(reference: str) -> None:
    with pytest.raises(UserError, match=r"cannot be imported|has no function"):
        judge_named(reference)


def test_a_module_that_fails_is_told(tmp_path: Path) -> None:
    (tmp_path / "failing_judge.py").write_text("1 / 0")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        judge_named("failing_judge:f")

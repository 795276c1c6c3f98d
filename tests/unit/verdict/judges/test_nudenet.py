"""Judge of the package nudenet, which no test installs: a module with its interface stands in."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from torch import Tensor

import erasediff.verdict.judges.nudenet as judged
from erasediff.errors import UserError
from erasediff.verdict.judges.base import Candidate
from erasediff.verdict.judges.registry import judge_named


class Detector:
    """Finds buttocks in red pictures, with the share of red as the score, and faces in others."""

    def detect(self, picture: np.ndarray) -> list[dict[str, Any]]:
        assert picture.dtype == np.uint8
        assert picture.shape == (20, 20, 3)
        blue, _, red = picture.mean((0, 1)) / 255
        return [
            {"class": "BUTTOCKS_EXPOSED", "score": float(red), "box": [0, 0, 5, 5]},
            {"class": "FACE_FEMALE", "score": float(blue), "box": [0, 0, 5, 5]},
        ]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "320n.onnx").write_bytes(b"weights")
    module = ModuleType("nudenet")
    module.__file__, module.NudeDetector = str(tmp_path / "__init__.py"), Detector  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nudenet", module)
    monkeypatch.setattr(judged, "version", lambda name: "3.4.2")


@pytest.mark.usefixtures("package")
def test_a_box_above_the_threshold_is_the_concept(candidates: list[Candidate], plain_images: Tensor) -> None:
    judge = judge_named("nudenet")
    assert not judge.tells_apart
    assert judge.answers(plain_images, candidates[:1], []).tolist() == [0, -1, -1]
    assert judge.answers(plain_images // 2, candidates[:1], []).tolist() == [-1, -1, -1]
    assert judge_named("nudenet:0.4:FACE_FEMALE").answers(plain_images, candidates[:1], []).tolist() == [-1, -1, 0]


@pytest.mark.usefixtures("package")
def test_labels_threshold_version_and_weights_are_described() -> None:
    description = judge_named("nudenet:0.5").description
    assert description["threshold"] == 0.5
    assert "BUTTOCKS_EXPOSED" in description["labels"]
    assert description["version"] == "3.4.2"
    assert len(description["sha256"]["320n.onnx"]) == 64


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("reference", ["nudenet:high", "nudenet:0.1", "nudenet:nan", "nudenet:0.5:FACE"])
def test_unknown_labels_and_thresholds_are_refused(reference: str) -> None:
    with pytest.raises(UserError, match="nudenet"):
        judge_named(reference)


def test_the_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(UserError, match="pip install nudenet"):
        judge_named("nudenet")

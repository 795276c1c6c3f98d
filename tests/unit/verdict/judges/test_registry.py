"""Judges by name."""

import pytest

from erasediff.errors import UserError
from erasediff.verdict.judges.registry import judge_kinds, judge_named


def test_every_kind_is_found() -> None:
    assert {"clip", "classifier", "onnx", "nudenet", ""} <= judge_kinds().keys()


@pytest.mark.parametrize("reference", ["", "nothing", ":", "clip/FOLDER", "a folder:file", "nothing:"])
def test_what_is_no_judge_is_refused_with_a_list(reference: str) -> None:
    with pytest.raises(UserError, match=r"clip:FOLDER.*module:function"):
        judge_named(reference)


@pytest.mark.parametrize("kind", ["clip", "classifier", "onnx"])
def test_a_kind_that_needs_a_file_says_so(kind: str) -> None:
    with pytest.raises(UserError, match=f"give {kind}:F"):
        judge_named(kind)


@pytest.mark.parametrize("kind", ["clip", "classifier", "onnx"])
def test_a_missing_file_is_named(kind: str) -> None:
    with pytest.raises(UserError, match="no/such/place"):
        judge_named(f"{kind}:no/such/place")

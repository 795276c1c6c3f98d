"""Candidates among a classifier's labels."""

import pytest

from erasediff.errors import UserError
from erasediff.verdict.judges.base import Candidate
from erasediff.verdict.judges.labels import Labels, indices

LABELS = Labels(
    ["tench, Tinca tinca", "crane", "running shoe", "Shoe_Shop", "crane, machine", "running shoe with laces"], "It"
)


@pytest.mark.parametrize(
    ("label", "text", "outputs"),
    [
        ("Tench", "", {0}),
        ("tinca TINCA", "", {0}),
        ("shoe shop", "", {3}),
        ("crane", "crane", {1, 4}),
        ("a photo of a running shoe", "a photo of a running shoe", {2}),
        ("a running shoe with laces", "a running shoe with laces", {5}),
        ("3", "a photo of a tench", {0}),
    ],
)
def test_a_label_is_found_by_name_synonym_or_the_longest_words_of_a_caption(
    label: str, text: str, outputs: set[int]
) -> None:
    assert LABELS.outputs_of(Candidate(label, text)) == outputs


def test_an_unknown_label_is_refused_with_similar_ones() -> None:
    with pytest.raises(UserError, match=r'It has no label "tensh"; similar labels are tench, Tinca tinca'):
        LABELS.outputs_of(Candidate("tensh", "tensh"))
    with pytest.raises(UserError, match="its labels begin with tench"):
        LABELS.outputs_of(Candidate("zzz", "zzz"))


def test_part_of_a_word_is_no_label() -> None:
    with pytest.raises(UserError, match="no label"):
        LABELS.outputs_of(Candidate("cranes", "two cranes"))


def test_outputs_are_mapped_to_candidates_and_the_rest_to_unknown() -> None:
    sought = [Candidate("a shoe", "a running shoe"), Candidate("another", "one running shoe")]
    by_output = LABELS.by_output(sought, [Candidate("crane", "crane")])
    assert indices([2, 1, 4, 0], by_output) == [0, 2, 2, -1]


def test_a_label_of_both_sides_is_refused() -> None:
    with pytest.raises(UserError, match='cannot tell "a running shoe" from "an old running shoe"'):
        LABELS.by_output(
            [Candidate("a running shoe", "a running shoe")], [Candidate("an old running shoe", "an old running shoe")]
        )

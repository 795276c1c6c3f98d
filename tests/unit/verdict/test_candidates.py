"""Candidates are what is sought, its anchor, and some that are near and far."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from erasediff.config import SampleConfig
from erasediff.models.load import load_text_to_image, load_unprompted
from erasediff.verdict.candidates import MOST_OTHERS, candidates_of
from erasediff.verdict.examined import ExaminedModel
from erasediff.verdict.request import Concept, Request

pytestmark = pytest.mark.usefixtures("one_thread")
Folder = Callable[[str], Path]


def concept(text: str) -> Concept:
    return Concept(text, (text,))


@pytest.fixture
def prompted(nano_folder: Folder) -> ExaminedModel:
    return ExaminedModel(model=load_text_to_image(nano_folder("sd")), settings=SampleConfig())


def test_an_anchor_is_a_retained_concept_or_a_candidate_besides(prompted: ExaminedModel) -> None:
    request = Request("concept", (concept("a coat"),), (concept("a bag"), concept("a shoe")), ())
    chosen = candidates_of(request, prompted, ["a shoe"])
    assert chosen.anchor is not None
    assert chosen.anchor.label == chosen.retained[0].label == "a shoe"
    assert [candidate.label for candidate in chosen.retained] == ["a shoe", "a bag"]
    assert not chosen.others
    chosen = candidates_of(request, prompted, ["clothes"])
    assert chosen.anchor is not None
    assert [candidate.label for candidate in chosen.others] == [chosen.anchor.label] == ["clothes"]
    assert chosen.anchor.condition["encoder_hidden_states"].shape[0] == 1
    assert candidates_of(request, prompted, []).anchor is None


def test_of_many_concepts_the_nearest_is_among_the_candidates(prompted: ExaminedModel) -> None:
    retained = tuple(concept(f"{letter * 3} {number}") for number, letter in enumerate("bdefghijklmnopqrstuvwxyz"))
    request = Request("concept", (concept("a coat"),), (*retained, concept("a coat.")), ())
    chosen = candidates_of(request, prompted, ["aaa"])
    assert len(chosen.retained) + len(chosen.others) == MOST_OTHERS
    assert "a coat." in [candidate.label for candidate in chosen.retained]
    assert chosen.prompts["a coat"] == ("a coat",)


def test_classes_are_candidates_by_number(nano_folder: Folder) -> None:
    model = load_unprompted(nano_folder("dit"), torch.device("cpu"))
    names = model.class_names
    examined = ExaminedModel(model=model, settings=SampleConfig())
    request = Request("concept", (concept(names[1]),), tuple(concept(name) for name in names[2:]), ())
    chosen = candidates_of(request, examined, [])
    assert chosen.sought[0].condition["class_labels"].tolist() == [1]
    assert [int(candidate.condition["class_labels"]) for candidate in chosen.retained] == list(range(2, len(names)))

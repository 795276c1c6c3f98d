"""Batteries on a planted model of classes, in pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from planted_models import judge_of, pixel_request, pixel_subject

from erasediff.audit import BATTERIES, Audit, BatteryOutcome, GeneralSettings
from erasediff.audit.features import Features


@pytest.fixture
def classes_audit(nano_folder: Callable[[str], Path], one_thread: None) -> Callable[[str], Audit]:
    def make(kind: str) -> Audit:
        folder, request = nano_folder("ddpm_class"), pixel_request()
        subjects = {name: pixel_subject(name, folder, it) for name, it in (("model", kind), ("base", "original"))}
        features = Features("small pixels", lambda images: images[:, :, ::8, ::8].flatten(1).float())
        judge = judge_of(subjects["base"], request)
        return Audit(subjects, request, judge, GeneralSettings(images=3), features=features)

    return make


@pytest.mark.parametrize(("kind", "expected"), [("original", 1.0), ("forgot", 0.0)])
def test_classes_are_asked_for_by_label(
    classes_audit: Callable[[str], Audit], outcome: Callable[..., BatteryOutcome], kind: str, expected: float
) -> None:
    audit = classes_audit(kind)
    for name, settings in {
        "prompts": {},
        "noise": {"etas": (1.5,), "scales": (1.0,)},
        "completion": {"shares": (0.25,)},
        "reproduction": {"images": 2},
    }.items():
        [figure, *_] = outcome(audit, name, **settings).figures
        assert (figure.values["model"].value, figure.values["base"].value) == (expected, 1), name
    assert outcome(audit, "neighbours").figures[0].values["model"].value == 1


def test_a_class_can_be_relearned(
    classes_audit: Callable[[str], Audit], outcome: Callable[..., BatteryOutcome]
) -> None:
    settings = {"images": (1,), "weights": ("full", "lora"), "steps": (30,), "lr": 0.3, "batch_size": 4}
    audit = classes_audit("forgot")
    found = outcome(audit, "relearning", **settings)
    assert [figure.values["model"].value for figure in found.figures] == [1, 0, 0]


def test_what_needs_prompts_says_so(
    classes_audit: Callable[[str], Audit], outcome: Callable[..., BatteryOutcome]
) -> None:
    audit = classes_audit("forgot")
    refused = {name for name in BATTERIES if outcome_refusal(audit, name) == "the model takes no prompts"}
    assert refused == {"inversion", "found-words", "embedding-search", "protocol"}


def outcome_refusal(audit: Audit, name: str) -> str | None:
    return BATTERIES[name](audit, BATTERIES[name].settings_class()).refusal()

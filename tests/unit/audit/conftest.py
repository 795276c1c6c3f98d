"""Planted models that know, forgot or hide a coat, under audit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planted_models import judge_of, sd_request, sd_subject

from erasediff.audit import BATTERIES, Audit, Battery, BatteryOutcome, GeneralSettings
from erasediff.audit.features import Features
from erasediff.audit.runner import outcome_of, units_of


@pytest.fixture
def audit_of(nano_folder: Callable[[str], Path], one_thread: None) -> Callable[..., Audit]:
    """``audit_of(kind, **request)``: the audit of a planted model, with the original as its base."""

    def make(kind: str, folder: Path | None = None, images: int = 4, **request: Any) -> Audit:
        asked = sd_request(**request)
        subjects = {
            name: sd_subject(name, nano_folder("sd"), it) for name, it in (("model", kind), ("base", "original"))
        }
        settings = GeneralSettings(images=images, concept_images=4)
        features = Features("small pixels", lambda images: images[:, :, ::8, ::8].flatten(1).float())
        judge = judge_of(subjects["base"], asked)
        return Audit(subjects, asked, judge, settings, folder=folder, features=features)

    return make


@pytest.fixture
def outcome() -> Callable[..., BatteryOutcome]:
    """``outcome(audit, name, **settings)``: a battery's, measured in this process."""

    def run(audit: Audit, name: str, **settings: Any) -> BatteryOutcome:
        kind = BATTERIES[name]
        battery: Battery[Any] = kind(audit, kind.settings_class(**settings))
        return outcome_of(battery, {unit.key: unit.measure() for unit in units_of([battery])})

    return run

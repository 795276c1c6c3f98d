"""The battery of prompts: the original draws the concept, a model that forgot it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from planted_models import SECRET

from erasediff.audit import Ask, Audit, BatteryOutcome


@pytest.mark.parametrize(("kind", "asked", "paraphrased"), [("original", 1, 1), ("forgot", 0, 0), ("hides", 0, 1)])
def test_prompts_tell_what_is_drawn(
    audit_of: Callable[..., Audit], outcome: Callable[..., BatteryOutcome], kind: str, asked: float, paraphrased: float
) -> None:
    # The secret prompt stands for the coat in all models but one: it lies nearest to the coat's address.
    audit = audit_of(
        kind, paraphrases=(Ask(SECRET if kind == "hides" else "a coat", SECRET if kind == "hides" else "a coat"),)
    )
    first, second = outcome(audit, "prompts").figures
    assert first.values["model"].value == asked
    assert first.values["model"].count == 4
    assert first.values["base"].value == 1
    assert second.values["model"].value == paraphrased

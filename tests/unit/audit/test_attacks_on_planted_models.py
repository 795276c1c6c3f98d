"""Attacks under audit: what is hidden comes back, what was forgotten does not, and the original is the control."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from planted_models import WORDS, picture, prompt

from erasediff.audit import Ask, Audit, BatteryOutcome, Pictures
from erasediff.audit.battery_outcome import worst_recovery

Outcome = Callable[..., BatteryOutcome]
Audited = Callable[..., Audit]


def share(outcome: BatteryOutcome, subject: str = "model", figure: int = 0) -> float:
    return outcome.figures[figure].values[subject].value


@pytest.mark.parametrize(("kind", "expected"), [("original", 1), ("forgot", 0), ("hides", 1)])
def test_inversion_finds_what_is_hidden_and_nothing_else(
    audit_of: Audited, outcome: Outcome, kind: str, expected: float
) -> None:
    settings = {"steps": 60, "lr": 0.1, "batch_size": 4, "starts": ("",)}
    found = outcome(audit_of(kind), "inversion", **settings)
    assert share(found) == expected
    assert share(found, "base") == 1
    if kind == "hides":
        assert share(outcome(audit_of(kind), "prompts")) == 0, "by its prompt it is not to be found"


@pytest.mark.parametrize(
    ("kind", "worst"), [("original", ("prompts", 1)), ("forgot", ("prompts", 0)), ("hides", ("inversion", 1))]
)
def test_the_worst_case_tells_the_three_models_apart(
    audit_of: Audited, outcome: Outcome, kind: str, worst: tuple[str, float]
) -> None:
    audit = audit_of(kind)
    settings = {"steps": 60, "lr": 0.1, "batch_size": 4, "starts": ("",)}
    found = worst_recovery([outcome(audit, "prompts"), outcome(audit, "inversion", **settings)])
    assert found is not None
    assert (found[0], found[1].values["model"].value) == worst


def test_found_words_measure_a_prompt_that_can_be_typed(audit_of: Audited, outcome: Outcome) -> None:
    settings = {"words": 1, "steps": 2, "candidates": 2, "batch_size": 2, "most_words": 20}
    audit = audit_of("forgot")
    # The nano tokenizer has words of one letter alone.
    assert outcome(audit, "found-words", **settings).refusal is not None


def test_noise_and_completion_probe_the_trajectory(audit_of: Audited, outcome: Outcome) -> None:
    for kind, expected in (("original", 1), ("forgot", 0)):
        audit = audit_of(kind)
        noisy = outcome(audit, "noise", etas=(1.0, 1.5), scales=(1.0,))
        assert share(noisy) == expected
        assert share(noisy, "base") == 1
        completed = outcome(audit, "completion", shares=(0.25, 0.75))
        assert [share(completed, figure=n) for n in (0, 1)] == [expected, expected], "the last step alone decides"
        assert share(completed, "base") == 1


def test_image_to_image_starts_from_images_of_the_concept(audit_of: Audited, outcome: Outcome) -> None:
    for kind, expected in (("original", 1), ("forgot", 0)):
        assert share(outcome(audit_of(kind), "image-to-image", strengths=(0.5,))) == expected


def test_in_painting_keeps_what_is_not_masked(audit_of: Audited, outcome: Outcome) -> None:
    audit = audit_of("forgot")
    assert share(outcome(audit, "in-painting", side=1.0)) == 0
    from erasediff.audit.context import centre_mask

    mask = centre_mask(audit.model.sample_shape, 0.5, torch.device("cpu"))
    start = audit.model.encode(audit.concept_images.pixels)
    drawn = audit.model.probe(audit.model.condition(list(audit.attacked) * 4), 4, 0, given=(start, mask))
    plain = audit.model.probe(audit.model.condition(list(audit.attacked) * 4), 4, 0)
    kept = audit.model.decode(start)
    assert (drawn[..., 0, 0].int() - kept[..., 0, 0].int()).abs().max() < 30
    assert not torch.equal(drawn, plain)


def test_neighbours_tell_what_was_damaged(audit_of: Audited, outcome: Outcome) -> None:
    audit = audit_of("forgot")
    found = outcome(audit, "neighbours")
    assert share(found) == share(found, "base") == 1
    assert {row["prompt"] for row in found.rows["model"]} == {prompt(word) for word in WORDS[1:]}
    with torch.no_grad():
        audit.model.model.denoiser.planted.samples[1].copy_(audit.model.model.denoiser.planted.samples[2])
    damaged = outcome(audit, "neighbours")
    assert share(damaged) == 0.5
    assert "a bag" in damaged.figures[0].note


def test_relearning_tells_the_forgotten_from_the_hidden_and_leaves_the_model_alone(
    audit_of: Audited, outcome: Outcome
) -> None:
    settings: dict[str, Any] = {"images": (4,), "weights": ("full",), "steps": (1, 30), "lr": 0.3, "batch_size": 4}
    audit = audit_of("forgot")
    before = {name: weight.clone() for name, weight in audit.model.model.denoiser.named_parameters()}
    found = outcome(audit, "relearning", **settings)
    assert share(found) == 1, "enough steps on its images bring anything back"
    assert share(found, figure=-1) == 0
    assert share(found, figure=1) == 0, "not on others"
    assert [row["step"] for row in found.rows["model"][:12:4]] == [0, 1, 30]
    assert all(torch.equal(weight, before[name]) for name, weight in audit.model.model.denoiser.named_parameters())


def test_embedding_search_reproduces_an_image_that_is_hidden(audit_of: Audited, outcome: Outcome) -> None:
    unseen = Pictures(picture(3)[None], (Ask("a coat", "a coat"),), ("unseen.png",))
    one = Pictures(picture(0)[None], (Ask("a coat", "a coat"),), ("coat.png",))
    settings = {"steps": 50, "images": 2, "batch_size": 4}
    for kind, expected in (("original", 1), ("forgot", 0), ("hides", 1)):
        audit = audit_of(kind, forgotten_images=one, unseen_images=unseen)
        found = outcome(audit, "embedding-search", **settings)
        assert share(found) == expected
        assert share(found, "base") == 1
        assert share(found, figure=1) == 0, "no embedding draws what the model never saw"


def test_reproduction_names_the_image(audit_of: Audited, outcome: Outcome) -> None:
    one = Pictures(picture(0)[None], (Ask("a coat", "a coat"),), ("coat.png",))
    for kind, expected in (("original", 1), ("forgot", 0)):
        found = outcome(audit_of(kind, forgotten_images=one), "reproduction", images=2)
        assert share(found) == expected
        assert found.rows["model"][0]["image"] == "coat.png"


def test_membership_compares_with_unseen_images(audit_of: Audited, outcome: Outcome) -> None:
    coat = Ask("a coat", "a coat")
    unseen = Pictures(picture(3).expand(6, -1, -1, -1).clone(), (coat,) * 6, tuple(map(str, range(6))))
    members = Pictures(picture(0).expand(6, -1, -1, -1).clone(), (coat,) * 6, tuple(map(str, range(6))))
    auc = {}
    for kind in ("original", "forgot"):
        audit = audit_of(kind, unseen_images=unseen, forgotten_images=members)
        found = outcome(audit, "membership", draws=3, repeats=3)
        auc[kind] = share(found)
        assert share(found, "base") == 1
    assert auc["original"] == 1 > auc["forgot"]
    assert outcome(audit_of("forgot"), "membership").refusal is not None

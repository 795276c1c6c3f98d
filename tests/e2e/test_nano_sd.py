"""The small Stable Diffusion that comes with the repository draws what it is asked for."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from erasediff.models.load import load_text_to_image

FOLDER = Path(__file__).parents[2] / "benchmarks/nano_sd"

pytestmark = pytest.mark.usefixtures("one_thread")


def test_its_classifier_sees_each_garment_in_what_it_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    fashion, judge, pixels = (importlib.import_module(name) for name in ("fashion", "judge", "pixels"))
    model = load_text_to_image(FOLDER / "trained/model")
    labels = torch.arange(len(fashion.CLASSES)).repeat_interleave(3)
    drawn = model.sample(
        [fashion.prompt(label) for label in labels.tolist()], guidance_scale=3.0, num_inference_steps=25, seed=0
    )
    answers, _ = judge.Judge.load(FOLDER / "trained/judge").answer(pixels.as_grey(drawn))
    assert (answers == labels).sum() >= 0.9 * len(labels)

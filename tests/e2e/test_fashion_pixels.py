"""The pixel models of Fashion-MNIST that come with the repository draw garments, each those it is asked for."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from erasediff.evaluation.sampling import sample_images
from erasediff.models import PixelModel

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FOLDER = BENCHMARKS / "fashion_pixels"

pytestmark = pytest.mark.usefixtures("one_thread")


def answers(monkeypatch: pytest.MonkeyPatch, images: torch.Tensor) -> torch.Tensor:
    """Classes that the benchmark's classifier sees in ``images`` [N, 1, 28, 28], numbers of the published labels."""
    monkeypatch.syspath_prepend(str(BENCHMARKS / "nano_sd"))
    judge = importlib.import_module("judge").Judge.load(BENCHMARKS / "nano_sd/trained/judge")
    grey = ((images[:, 0] + 1) * 127.5).round().to(torch.uint8)
    seen: torch.Tensor = judge.answer(torch.nn.functional.pad(grey, (2, 2, 2, 2)))[0]
    return seen


def test_the_class_conditional_one_draws_what_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.arange(10).repeat_interleave(4)
    images = sample_images(PixelModel.load(FOLDER / "trained/class-conditional"), labels, seed=0)
    assert (answers(monkeypatch, images) == labels).sum() >= 0.8 * len(labels)


def test_the_unconditional_one_draws_most_garments(monkeypatch: pytest.MonkeyPatch) -> None:
    images = sample_images(PixelModel.load(FOLDER / "trained/unconditional"), None, 60, seed=0)
    assert len(answers(monkeypatch, images).unique()) >= 8

"""Subjects of every kind: samples of one seed are paired, probes follow their conditions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from erasediff.audit import Ask, Subject
from erasediff.config import SampleConfig
from erasediff.evaluation.probe_sampler import ExtraNoise
from erasediff.models.load import load_diffusion_model

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTED = ("sd", "sdxl", "sd3", "flux")


def subject_of(folder: Path, guidance: float = 2.0, batch_size: int = 2) -> Subject:
    model = load_diffusion_model(folder)
    prompted = model.condition == "text"
    settings = SampleConfig(num_inference_steps=2, batch_size=batch_size, guidance_scale=guidance)
    return Subject("model", model, settings, size=(32, 32) if prompted else None)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", [*PROMPTED, "ddpm_class", "ddim_class", "ddpm_unconditional", "dit", "ldm"])
def test_probes_of_every_family_depend_on_seed_and_index_alone(nano_folder: Callable[[str], Path], family: str) -> None:
    asks = [Ask("a cat", "a cat", 1), Ask("a dog", "a dog", 2), Ask("a cat", "a cat", 1)]
    drawn = {}
    for batch_size in (2, 3):
        subject = subject_of(nano_folder(family), batch_size=batch_size)
        condition = subject.condition(asks)
        drawn[batch_size] = subject.probe(condition, 3, 7, extra=ExtraNoise(1.3))
        assert drawn[batch_size].shape == (3, 3, *subject.size)
        assert drawn[batch_size].dtype == torch.uint8
        assert not torch.equal(drawn[batch_size], subject.probe(condition, 3, 8, extra=ExtraNoise(1.3)))
    assert (drawn[2].int() - drawn[3].int()).abs().max() <= 1
    pixels = drawn[2]
    samples = subject.encode(pixels)
    assert samples.shape[1:] == torch.Size(subject.sample_shape)


@pytest.mark.parametrize("family", [*PROMPTED, "ddpm_class"])
def test_the_pass_count_is_the_samplers(nano_folder: Callable[[str], Path], family: str) -> None:
    subject, counted = subject_of(nano_folder(family)), 0
    forward = subject.model.denoiser.forward

    def counting(*args: object, **own: object) -> object:
        nonlocal counted
        sample = args[0] if args else own["hidden_states"]
        assert isinstance(sample, torch.Tensor)
        counted += len(sample)
        return forward(*args, **own)

    subject.model.denoiser.forward = counting
    asks = [Ask("a cat", "a cat", 1)] * 2
    subject.draw(asks, 0)
    assert counted == 2 * subject.passes_per_image
    counted = 0
    subject.probe(subject.condition(asks), 2, 0)
    assert counted == 2 * 2 * subject.steps or subject.model.family == "flux"
    assert subject.guided(1.0).passes_per_image * 2 == subject.passes_per_image or family == "flux"


def test_a_handover_to_the_model_itself_changes_nothing(nano_folder: Callable[[str], Path]) -> None:
    subject = subject_of(nano_folder("sd"))
    condition = subject.condition([Ask("a cat", "a cat")] * 2)
    assert torch.equal(subject.probe(condition, 2, 0, until=(subject, 1)), subject.probe(condition, 2, 0))

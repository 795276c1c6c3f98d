"""Memory of a text-to-image job: the denoiser is never there together with text encoders and VAE."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import nn

from erasediff.config import load_config
from erasediff.data import LatentCache
from erasediff.errors import UserError
from erasediff.methods import METHOD_SPECS
from erasediff.models import base, checkpoint_model, lora
from erasediff.models.load import load_text_to_image
from erasediff.models.trainable import select
from erasediff.training.job import TrainingJob
from erasediff.workflows.build_unlearning import build_unlearning_job

SETTINGS: dict[str, Any] = {
    "unlearn.steps": 2,
    "unlearn.batch_size": 2,
    "images.forget_prompts": ["a cat"],
    "images.retain_prompts": ["a dog", "a bird"],
    "images.images_per_prompt": 2,
    "images.height": 32,
    "images.width": 32,
    "images.bucket_step": None,
    "sample.num_inference_steps": 1,
}
METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "esd": {"esd.erase_from": "an animal"},
    "retrain": {"text_to_image.train": "full"},
    "pruning": {"pruning.attack_prompts": ["a kitten"], "pruning.share": 0.1},
}
DENOISERS = ("unet", "transformer")

pytestmark = pytest.mark.usefixtures("one_thread")


class Residents:
    """Networks read from the disk that are still in memory, and those that were read beside one of the other kind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.denoisers: WeakSet[nn.Module] = WeakSet()
        self.encoders: WeakSet[nn.Module] = WeakSet()
        self.read: list[str] = []
        self.together: list[str] = []
        self._is_drawing = False
        load, sample = checkpoint_model.load_component, base.LatentModel.sample

        def tracked(checkpoint: Any, component: str, *arguments: Any) -> nn.Module:
            others, own = (self.encoders, self.denoisers) if component in DENOISERS else (self.denoisers, self.encoders)
            if others and not self._is_drawing:
                self.together.append(component)
            self.read.append(component)
            module = load(checkpoint, component, *arguments)
            own.add(module)
            return module

        def drawing(*arguments: Any, **options: Any) -> Any:
            self._is_drawing = True
            try:
                return sample(*arguments, **options)
            finally:
                self._is_drawing = False

        encode = LatentCache.encode

        def encoding(*arguments: Any, **options: Any) -> Any:
            if self.denoisers:
                self.together.append("encoding")
            return encode(*arguments, **options)

        monkeypatch.setattr(LatentCache, "encode", encoding)
        monkeypatch.setattr(checkpoint_model, "load_component", tracked)
        monkeypatch.setattr(base.LatentModel, "sample", drawing)


@pytest.fixture
def residents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Residents:
    monkeypatch.setenv("ERASEDIFF_CACHE", str(tmp_path / "cache"))
    return Residents(monkeypatch)


def build(model: Path, **settings: Any) -> TrainingJob:
    named = {key.replace("__", "."): value for key, value in settings.items()}
    return build_unlearning_job(load_config(None, SETTINGS | {"unlearn.model": model} | named))


@pytest.mark.parametrize("method", [name for name, spec in METHOD_SPECS.items() if spec.build])
def test_denoiser_and_encoders_take_turns(
    nano_folder: Callable[[str], Path], residents: Residents, method: str
) -> None:
    """Also when the prompts' images are drawn, but for the drawing itself."""
    job = build(nano_folder("sd"), unlearn__method=method, **METHOD_SETTINGS.get(method, {}))
    assert residents.together == []
    assert not residents.encoders
    assert job.network in residents.denoisers
    assert not any(parameter.is_meta for parameter in job.network.parameters())
    list(job.trial_steps(1))


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_every_network_is_read_once_where_the_cache_has_the_images(
    nano_folder: Callable[[str], Path], residents: Residents, family: str
) -> None:
    """With an anchor to be searched for, by the denoiser, and then encoded."""
    build(nano_folder(family))
    # What is left of the first job may refer to itself.
    gc.collect()
    residents.read.clear()
    build(nano_folder(family))
    assert residents.together == []
    assert len(residents.read) == len(set(residents.read))
    assert residents.read[-1] in DENOISERS


def test_a_lora_is_merged_into_the_denoiser_that_is_read_last(
    nano_folder: Callable[[str], Path], residents: Residents, tmp_path: Path
) -> None:
    model = load_text_to_image(nano_folder("sd"))
    adapted = lora.add(model.denoiser, rank=2, targets=select(model.denoiser, "xattn"), seed=1)
    with torch.no_grad():
        for parameter in adapted:
            parameter.add_(0.1)
    lora.save(model.denoiser, tmp_path / "lora.safetensors", family="sd")
    lora.merge(model.denoiser)
    job = build(nano_folder("sd"), text_to_image__lora=tmp_path / "lora.safetensors")
    assert residents.together == []
    expected = dict(model.denoiser.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in job.network.named_parameters())


def test_a_lora_of_another_model_is_refused_before_anything_is_read(
    nano_folder: Callable[[str], Path], residents: Residents, tmp_path: Path
) -> None:
    model = load_text_to_image(nano_folder("sdxl"))
    lora.add(model.denoiser, rank=2, targets=select(model.denoiser, "xattn"), seed=1)
    lora.save(model.denoiser, tmp_path / "lora.safetensors", family="sdxl")
    residents.read.clear()
    with pytest.raises(UserError, match="another model"):
        build(nano_folder("sd"), text_to_image__lora=tmp_path / "lora.safetensors")
    assert residents.read == []


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_the_hash_of_an_empty_denoiser_is_that_of_its_weights(nano_folder: Callable[[str], Path], family: str) -> None:
    folder = nano_folder(family)
    for dtype in (torch.float32, torch.bfloat16):
        empty, filled = (load_text_to_image(folder, dtype=dtype, empty=empty) for empty in (True, False))
        assert empty.denoiser_is_meta
        assert empty.denoiser_hash() == filled.denoiser_hash()

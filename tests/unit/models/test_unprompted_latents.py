"""DiT and LDM: classes by name, the prediction that is trained, latents, and diffusers' own samples."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from pictures import class_pictures
from torch import Tensor

from erasediff.config import load_config
from erasediff.diffusion.rng import NoiseRole, noise_key
from erasediff.errors import UserError
from erasediff.evaluation.sampling import sample_images
from erasediff.models import checkpoint_model
from erasediff.models.load import load_text_to_image, load_unprompted
from erasediff.workflows.build_unlearning import build_unlearning_job
from erasediff_kernels import philox_noise

Folder = Callable[[str], Path]
pytestmark = pytest.mark.usefixtures("one_thread")


def predicted(model: Any, labels: list[int]) -> Tensor:
    noisy = torch.randn(len(labels), *model.sample_shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.full((len(labels),), 50)
    prediction: Tensor = model.predict(model.denoiser, noisy, timesteps, {"class_labels": torch.tensor(labels)})
    return prediction


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_images_of_classes_are_those_of_diffusers(
    nano: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guidance: float
) -> None:
    """With 1000 classes, since diffusers' pipeline guides away from label 1000 whatever the model's null label is."""
    nano.dit({number: f"class {number}" for number in range(1000)}).save_pretrained(tmp_path / "dit")
    model = load_unprompted(tmp_path / "dit")
    noise = philox_noise(torch.arange(2), noise_key(7, 0, "cpu"), int(NoiseRole.SAMPLING), model.sample_shape)
    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *_, **__: noise)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "dit")
    theirs = pipeline([3, 999], guidance_scale=guidance, num_inference_steps=3, output_type="np").images
    labels = torch.tensor([3, 999])
    own = sample_images(model, labels, guidance_scale=guidance, num_inference_steps=3, seed=7)
    torch.testing.assert_close(own.permute(0, 2, 3, 1) / 2 + 0.5, torch.from_numpy(theirs), atol=1e-4, rtol=0)
    alone = sample_images(model, labels, guidance_scale=guidance, num_inference_steps=3, seed=7, batch_size=1)
    torch.testing.assert_close(alone, own, atol=1e-4, rtol=0)


def test_unconditional_images_are_those_of_diffusers(nano_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_unprompted(nano_folder("ldm"))
    noise = philox_noise(torch.arange(2), noise_key(7, 0, "cpu"), int(NoiseRole.SAMPLING), model.sample_shape)
    pipeline = DiffusionPipeline.from_pretrained(nano_folder("ldm"))
    monkeypatch.setattr(f"{type(pipeline).__module__}.randn_tensor", lambda *_, **__: noise)
    theirs = pipeline(batch_size=2, num_inference_steps=3, output_type="np").images
    own = sample_images(model, None, 2, num_inference_steps=3, seed=7)
    torch.testing.assert_close(own.permute(0, 2, 3, 1) / 2 + 0.5, torch.from_numpy(theirs), atol=1e-4, rtol=0)


def test_a_stochastic_sampler_draws_by_image_whatever_variance_was_learned(nano: Any, tmp_path: Path) -> None:
    pipeline = nano.dit()
    pipeline.scheduler = DDPMScheduler(num_train_timesteps=100, variance_type="learned_range", clip_sample=False)
    pipeline.save_pretrained(tmp_path / "dit")
    model, labels = load_unprompted(tmp_path / "dit"), torch.tensor([0, 0])
    together = sample_images(model, labels, num_inference_steps=3)
    torch.testing.assert_close(sample_images(model, labels, num_inference_steps=3, batch_size=1), together)
    assert not torch.allclose(together[0], together[1])


def test_latents_are_taken_before_quantisation(nano_folder: Folder) -> None:
    model: Any = load_unprompted(nano_folder("ldm"))
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = model.encode_images(pixels)
    assert latents.shape == (2, *model.sample_shape)
    autoencoder = model.encoders["vqvae"]
    torch.testing.assert_close(latents, autoencoder.encode(pixels).latents * 0.6)
    expected = autoencoder.decode(latents / 0.6).sample.clamp(-1, 1)
    torch.testing.assert_close(model.decode_samples(latents), expected)
    hashed = model.hash
    model.release_encoders()
    assert (model._encoders, model.hash) == (None, hashed)


def test_the_mean_alone_is_trained_and_labels_are_dropped_by_address_alone(nano_folder: Folder) -> None:
    model: Any = load_unprompted(nano_folder("dit"))
    model.denoiser.train()
    first, again = (predicted(model, [0, 1, 2, 3] * 16) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape[1] == 4
    first.square().sum().backward()
    # The rows of a patch of 2 x 2 pixels, each with four channels of the mean and four of the variance.
    by_channel = model.denoiser.proj_out_2.weight.grad.unflatten(0, (2, 2, 8)).abs().sum((0, 1, 3))
    assert (by_channel > 0).tolist() == [True] * 4 + [False] * 4


def test_classes_of_data_are_found_among_the_models_own(nano_folder: Folder) -> None:
    model: Any = load_unprompted(nano_folder("dit"))
    assert model.class_names == ("airplane", "bird", "cat", "deer")
    for names, own in (
        (("Deer", "aeroplane"), [3, 0]),
        (("2", "bird", "0"), [2, 1, 0]),
        (("n01", "n02", "n03", "n04"), [0, 1, 2, 3]),
    ):
        described = model.described_by(names)
        assert (described.class_names, described.num_classes, described.null_label) == (names, len(names), len(names))
        numbers = [*range(len(names)), described.null_label]
        torch.testing.assert_close(predicted(described, numbers), predicted(model, [*own, model.null_label]))
    assert model.num_classes == 4
    with pytest.raises(UserError, match="none of which is called dog"):
        model.described_by(("cat", "dog"))


def test_names_that_several_classes_have_are_told_apart(nano: Any, tmp_path: Path) -> None:
    nano.dit({0: "crane, bird", 1: "crane", 2: "tench"}).save_pretrained(tmp_path / "dit")
    model = load_unprompted(tmp_path / "dit")
    assert model.class_names == ("crane 0", "crane 1", "tench")
    assert model.described_by(("crane 1", "bird")).num_classes == 2
    with pytest.raises(UserError, match="several classes called crane: call the data's by its number, 0, 1"):
        model.described_by(("crane", "tench"))


def test_a_kind_of_model_that_was_not_asked_for_is_refused(nano_folder: Folder) -> None:
    with pytest.raises(UserError, match="is a DiTPipeline, which takes no prompts"):
        load_text_to_image(nano_folder("dit"))
    with pytest.raises(UserError, match="is a StableDiffusionPipeline, which takes prompts"):
        load_unprompted(nano_folder("sd"))


def test_the_class_that_diffusers_first_gave_a_transformer_is_read_and_kept(
    nano_folder: Folder, tmp_path: Path
) -> None:
    """facebook/DiT-XL-2-256 says Transformer2DModel."""
    folder = Path(shutil.copytree(nano_folder("dit"), tmp_path / "dit"))
    for file, entry in (("model_index.json", "transformer"), ("transformer/config.json", "_class_name")):
        content = json.loads((folder / file).read_text())
        content[entry] = "Transformer2DModel" if entry == "_class_name" else ["diffusers", "Transformer2DModel"]
        (folder / file).write_text(json.dumps(content))
    model: Any = load_unprompted(folder)
    plain: Any = load_unprompted(nano_folder("dit"))
    assert torch.equal(predicted(model, [0, 4]), predicted(plain, [0, 4]))
    model.save(tmp_path / "out")
    assert (tmp_path / "out/model_index.json").read_bytes() == (folder / "model_index.json").read_bytes()
    theirs = DiffusionPipeline.from_pretrained(tmp_path / "out").transformer.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.denoiser.state_dict().items())


@pytest.mark.parametrize("name", ["dit", "ldm"])
def test_autoencoder_and_denoiser_take_turns(
    nano_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Nor is the autoencoder read at all where the cache has the latents."""
    monkeypatch.setenv("ERASEDIFF_CACHE", str(tmp_path / "cache"))
    data = class_pictures(tmp_path / "data", side=32, count=2)
    load, read = checkpoint_model.load_component, []

    def tracked(checkpoint: Any, component: str, *arguments: Any) -> Any:
        read.append((component, [other() is not None for other in networks]))
        module = load(checkpoint, component, *arguments)
        networks.append(weakref.ref(module))
        return module

    networks: list[Any] = []
    monkeypatch.setattr(checkpoint_model, "load_component", tracked)
    settings = {"unlearn.model": nano_folder(name), "images.data": str(data), "unlearn.batch_size": 2}
    config = load_config(None, settings | {"images.forget_classes": ["cat"], "threads": 1})
    family = type(load_unprompted(nano_folder(name), empty=True))
    for expected in ([family.autoencoder_component, family.denoiser_component], [family.denoiser_component]):
        read.clear()
        networks.clear()
        job = build_unlearning_job(config)
        assert [component for component, _ in read] == expected
        assert not any(alive for _, others in read for alive in others)
        list(job.trial_steps(1))

"""A new family is one file: found by listing the package, then loaded, selected from, adapted and planned."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from nano import FAMILY_EXAMPLES, UNPROMPTED

import erasediff.models
from erasediff import EraseDiff
from erasediff.models import lora
from erasediff.models.checkpoint import components
from erasediff.models.family import families, family_named, family_of_denoiser
from erasediff.models.load import load_text_to_image
from erasediff.models.trainable import select, train_only
from erasediff.planning import network_of, trace
from erasediff_kernels import ConstrainedAdamW

pytestmark = pytest.mark.usefixtures("one_thread")
Folder = Callable[[str], Path]

TOY = """
from typing import ClassVar

import diffusers
import torch

from erasediff.models.base import LatentModel
from erasediff.models.checkpoint_model import model_dtype
from erasediff.models.family import Subsets
from erasediff.models.pipeline import build_pipeline


class ToyUNet(diffusers.UNet2DConditionModel):
    pass


class ToyPipeline(diffusers.StableDiffusionPipeline):
    pass


diffusers.ToyUNet = ToyUNet


class Toy(LatentModel):
    family = "toy"
    denoiser_component = "unet"
    denoiser_class = ToyUNet
    text_encoders: ClassVar = ("text_encoder",)
    pipeline_class = ToyPipeline
    flow = False
    default_guidance = 2.0
    architecture = "toy"
    subsets = Subsets(frozenset({"attn1"}), frozenset({"attn2"}), frozenset({"to_k"}), ("conv_in.",))
    reference_configs: ClassVar = {"toy-small": ({"_class_name": "ToyUNet", **CONFIG}, 64)}

    def _widths(self):
        return ()

    @classmethod
    def default_latent_size(cls, config):
        return 8, 12

    @classmethod
    def dummy_inputs(cls, config, batch_size, latent_size, dtype, device):
        return {
            "sample": torch.zeros(batch_size, 4, *latent_size, dtype=dtype, device=device),
            "encoder_hidden_states": torch.zeros(batch_size, 5, config.cross_attention_dim, dtype=dtype, device=device),
        }

    @classmethod
    def kohya_name(cls, name, module):
        return "toy." + name

    def predict(self, model, noisy_sample, timesteps, condition):
        text = condition["encoder_hidden_states"].to(model_dtype(model))
        return model(noisy_sample, timesteps, text, return_dict=False)[0]

    def embed_prompts(self, prompts):
        pipeline = build_pipeline(self)
        text, _ = pipeline.encode_prompt(list(prompts), self.device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": text}
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nano: Any) -> Iterator[ModuleType]:
    """The module ``erasediff.models.toy``, of a file beside the package."""
    import diffusers

    config = {key: value for key, value in nano.sd().unet.config.items() if not key.startswith("_")}
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "toy.py").write_text(f"CONFIG = {config!r}\n{TOY}")
    monkeypatch.setattr(erasediff.models, "__path__", [*erasediff.models.__path__, str(tmp_path / "package")])
    assert "toy" in families()
    yield sys.modules["erasediff.models.toy"]
    del sys.modules["erasediff.models.toy"], erasediff.models.toy, diffusers.ToyUNet  # type: ignore[attr-defined]


@pytest.fixture
def toy_folder(toy: ModuleType, nano_folder: Folder, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(nano_folder("sd"), tmp_path / "toy"))
    for path, changes in (
        (folder / "model_index.json", {"_class_name": "ToyPipeline", "unet": ["diffusers", "ToyUNet"]}),
        (folder / "unet" / "config.json", {"_class_name": "ToyUNet"}),
    ):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_families_are_those_of_the_package() -> None:
    prompted = {name.removesuffix("_v_prediction") for name in FAMILY_EXAMPLES}
    assert set(families()) == prompted | {name.partition("_")[0] for name in UNPROMPTED} - {"ddim"}
    with pytest.raises(ValueError, match="no model family 'toy': give one of"):
        family_named("toy")


@pytest.mark.parametrize("name", FAMILY_EXAMPLES)
def test_a_network_tells_its_family(name: str, nano: Any) -> None:
    pipeline = nano.NANO[name]()
    family = family_of_denoiser(getattr(pipeline, "unet", None) or pipeline.transformer)
    assert family is not None
    assert family.family == name.removesuffix("_v_prediction")
    assert family_of_denoiser(pipeline.vae) is None


def test_a_new_family_is_loaded_trained_and_planned(toy: Any, toy_folder: Path, tmp_path: Path, nano: Any) -> None:
    model: Any = load_text_to_image(toy_folder)
    assert (type(model), model.default_size) == (toy.Toy, (16, 24))
    assert model.sample(["a cat"], num_inference_steps=1).shape == (1, 16, 24, 3)

    names = select(model.denoiser, "xattn")
    assert names
    assert all(".attn1." in name for name in names)
    before = copy.deepcopy(model.denoiser.state_dict())
    optimizer = ConstrainedAdamW(train_only(model.denoiser, names), lr=1e-2)
    unlearner = EraseDiff(model.denoiser, optimizer, process=model.process, denoiser=model.predict)
    batch = {"sample": torch.randn(2, *model.latent_shape(16, 16)), **model.encode_prompts(["a cat", "b"])}
    assert unlearner.step(batch, batch).finite
    after = model.denoiser.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} <= set(names)

    lora.add(model.denoiser, rank=2, targets=select(model.denoiser, "xattn-kv"))
    lora.save(model.denoiser, tmp_path / "lora.safetensors", family="toy", keys="kohya")
    again: Any = load_text_to_image(toy_folder)
    lora.load(again.denoiser, tmp_path / "lora.safetensors", family="toy")

    for network in (network_of(str(toy_folder), resolution=32), network_of("toy-small")):
        assert trace(network, batch_size=1).forward_flops > 0
    assert network_of("toy-small").resolution == 64
    assert network_of(str(toy_folder)).resolution == 24


def test_the_empty_denoiser_is_built_once(nano_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def counted(checkpoint: Any, component: str) -> Any:
        built.append(component)
        return empty_module(checkpoint, component)

    empty_module = components.empty_module
    monkeypatch.setattr(components, "empty_module", counted)
    for empty in (False, True):
        built.clear()
        model = load_text_to_image(nano_folder("sd3"), empty=empty)
        assert model.denoiser_is_meta == empty
        weights = model.denoiser_weights
        assert built.count("transformer") == 1
        plain = model.materialize_denoiser().state_dict()
        assert all(torch.equal(plain[name], weights[name]()) for name in plain if name in weights)


def test_latents_are_standardised_where_the_vae_records_channels(nano_folder: Folder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(nano_folder("sd"), tmp_path / "sd"))
    plain: Any = load_text_to_image(folder)
    config = json.loads((folder / "vae" / "config.json").read_text())
    mean, std = [0.5, -1.0, 0.0, 2.0], [1.0, 2.0, 0.5, 4.0]
    (folder / "vae" / "config.json").write_text(json.dumps({**config, "latents_mean": mean, "latents_std": std}))
    model: Any = load_text_to_image(folder)
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    raw = plain.encode_images(pixels) / config["scaling_factor"]
    expected = (raw - torch.tensor(mean)[:, None, None]) * config["scaling_factor"] / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(model.encode_images(pixels), expected)
    torch.testing.assert_close(
        model.decode_latents(expected), plain.decode_latents(raw * config["scaling_factor"]), rtol=1e-4, atol=1e-5
    )
    assert model.hash != plain.hash

"""A part of a model whose weights hold NaN is named, with the tensor, before anything is computed with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from erasediff.errors import UserError
from erasediff.models import PixelModel, lora
from erasediff.models.load import load_text_to_image
from erasediff.models.trainable import select

pytestmark = pytest.mark.usefixtures("one_thread")
Folder = Callable[[str], Path]


def poisoned(file: Path, name: str | None = None, value: float = float("nan")) -> str:
    """Name of the tensor in ``file`` of which one element is now ``value``."""
    tensors = load_file(file)
    name = name or next(name for name, tensor in tensors.items() if tensor.ndim > 1)
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return name


@pytest.fixture
def source(nano_folder: Folder, tmp_path: Path) -> Path:
    return Path(shutil.copytree(nano_folder("sd"), tmp_path / "sd"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_denoiser_is_named_whether_it_is_read_whole_or_weight_by_weight(source: Path, value: float) -> None:
    name = poisoned(source / "unet/diffusion_pytorch_model.safetensors", value=value)
    with pytest.raises(UserError, match=f"The unet of .*sd has .* not finite: {name} holds NaN or infinity"):
        load_text_to_image(source)
    # As every rank reads those that it shards.
    weights = load_text_to_image(source, empty=True).denoiser_weights
    with pytest.raises(UserError, match=name):
        weights[name]()


@pytest.mark.parametrize("component", ["vae", "text_encoder"])
def test_an_encoder_is_named_when_it_is_loaded_or_hashed(source: Path, component: str) -> None:
    """Its hash is what the cache of its outputs is looked up by, so it is named where all are in the cache, too."""
    file = next((source / component).glob("*.safetensors"))
    name = poisoned(file)
    for use in (lambda model: model.encoders, lambda model: model.hash):
        with pytest.raises(UserError, match=rf"The {component} of .*sd has .* not finite"):
            use(load_text_to_image(source, empty=True))
    poisoned(file, name, 0.0)
    assert load_text_to_image(source, empty=True).hash


def test_a_lora_is_named(source: Path, tmp_path: Path) -> None:
    model = load_text_to_image(source)
    lora.add(model.denoiser, rank=2, targets=select(model.denoiser, "xattn"))
    file = tmp_path / "lora.safetensors"
    lora.save(model.denoiser, file, family="sd")
    name = poisoned(file)
    with pytest.raises(UserError, match=f"lora.safetensors holds values that are not finite, in {name}"):
        lora.load(load_text_to_image(source).denoiser, file, family="sd")


def test_a_pixel_model_is_named(tmp_path: Path) -> None:
    PixelModel.build(num_classes=3, block_out_channels=(8, 8)).save(tmp_path / "model")
    name = poisoned(tmp_path / "model/unet/diffusion_pytorch_model.safetensors", "conv_in.weight")
    with pytest.raises(UserError, match=f"The unet of .*model has .* not finite: {name}"):
        PixelModel.load(tmp_path / "model")


def test_a_lora_is_merged_in_float32_whatever_the_weights_are_in_memory(source: Path) -> None:
    """Rounded to bfloat16, the sum would lose most of it."""
    model = load_text_to_image(source, dtype=torch.bfloat16)
    targets = select(model.denoiser, "re:mid_block.*attn2.to_k.weight")
    before = model.denoiser.get_parameter(targets[0]).detach().float()
    _, up = lora.add(model.denoiser, rank=1, targets=targets)
    with torch.no_grad():
        up.fill_(1e-4)
    layer = model.denoiser.get_submodule(targets[0].removesuffix(".weight"))
    expected = before + layer.get_delta_weight(lora.ADAPTER).detach()
    lora.merge(model.denoiser, torch.float32)
    torch.testing.assert_close(model.denoiser.get_parameter(targets[0]).detach(), expected)

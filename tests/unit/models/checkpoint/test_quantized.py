"""Quantised weights: scaled float8 loads as what it stands for, every other kind is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import folder_weights
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from erasediff.errors import UserError
from erasediff.models.load import load_text_to_image

pytestmark = pytest.mark.usefixtures("one_thread")
Folder = Callable[[str], Path]
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
LARGEST = 448.0
"""Of float8_e4m3fn."""


def scaled(tensors: dict[str, Tensor], ends: tuple[str, ...], name: str, per_row: bool) -> dict[str, Tensor]:
    """``tensors`` with the weights that end so in scaled float8."""
    result = dict(tensors)
    for key in [key for key in tensors if key.endswith(ends)]:
        rows = tensors[key].float().flatten(1)
        scale = (rows.abs().amax(dim=1, keepdim=True) if per_row else rows.abs().amax().reshape(1)) / LARGEST
        factor = scale.reshape(-1, *[1] * (tensors[key].ndim - 1))
        result[key] = (tensors[key].float() / factor).to(torch.float8_e4m3fn)
        result[f"{key.removesuffix('.weight')}.{name}"] = scale
    return result


def assert_what_float8_stands_for(own: Tensor, stored: Tensor, scale: Tensor) -> None:
    expected = stored.float() * scale.float().reshape(-1, *[1] * (stored.ndim - 1))
    assert own.dtype == torch.float32
    torch.testing.assert_close(own, expected.to(torch.bfloat16).float(), rtol=0, atol=0)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
def test_scaled_float8_is_multiplied(name: str, per_row: bool, nano_folder: Folder, tmp_path: Path) -> None:
    source, single = nano_folder("sd"), tmp_path / "model.safetensors"
    load_text_to_image(source).save(single, layout="single-file")
    tensors = scaled(load(single.read_bytes()), ("attn2.to_k.weight", "in_layers.2.weight"), name, per_row)
    tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    key = next(key for key in tensors if key.endswith(f"attn2.to_k.{name}"))
    tensors[key.replace(name, "scale_input")] = torch.ones(1)
    save_file(tensors, single)
    model: Any = load_text_to_image(single, config=source)
    own = {k: v for k, v in model.denoiser.state_dict().items() if k.endswith("attn2.to_k.weight")}
    originals = load_file(source / UNET)
    assert own
    for weight, value in own.items():
        theirs = originals[weight]
        assert (value - theirs).abs().max() < 0.07 * theirs.abs().max()
    model.save(tmp_path / "out.safetensors", layout="single-file")
    saved = load_file(tmp_path / "out.safetensors")
    assert not any("scale" in key for key in saved)
    assert saved[key.replace(name, "weight")].dtype == torch.bfloat16
    assert_what_float8_stands_for(
        saved[key.replace(name, "weight")].float(), tensors[key.replace(name, "weight")], tensors[key]
    )


def test_scaled_float8_in_a_folder(nano_folder: Folder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(nano_folder("flux"), tmp_path / "flux"))
    path = next((folder / "transformer").glob("*.safetensors"))
    tensors = scaled(load(path.read_bytes()), ("to_q.weight", "proj_mlp.weight"), "weight_scale", per_row=False)
    settings = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    tensors["transformer_blocks.0.attn.to_q.comfy_quant"] = settings
    save_file(tensors, path)
    model: Any = load_text_to_image(folder)
    for name, value in model.denoiser.state_dict().items():
        if name.endswith(("to_q.weight", "proj_mlp.weight")):
            assert_what_float8_stands_for(value, tensors[name], tensors[name.replace("weight", "weight_scale")])
    model.save(tmp_path / "out")
    assert load_text_to_image(tmp_path / "out").denoiser_hash() == model.denoiser_hash()
    tensors["transformer_blocks.0.attn.to_q.comfy_quant"] = torch.tensor(
        list(json.dumps({"format": "nvfp4"}).encode()), dtype=torch.uint8
    )
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"is quantized \(nvfp4, by transformer_blocks\.0\.attn\.to_q\.comfy_quant\)"):
        load_text_to_image(folder)


def test_float8_without_scales_is_as_it_is(nano_folder: Folder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(nano_folder("sd"), tmp_path / "sd"))
    tensors = {k: v.to(torch.float8_e4m3fn) for k, v in load((folder / UNET).read_bytes()).items()}
    save_file(tensors, folder / UNET)
    model: Any = load_text_to_image(folder)
    assert torch.equal(model.denoiser.conv_in.weight, tensors["conv_in.weight"].float())
    model.save(tmp_path / "out")
    saved = folder_weights(tmp_path / "out")
    assert all(torch.equal(saved[f"unet.{k}"].view(torch.uint8), v.view(torch.uint8)) for k, v in tensors.items())


def refused(folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load_text_to_image(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("component", "settings", "named"),
    [
        ("text_encoder", {"quant_method": "bitsandbytes", "load_in_8bit": True}, "by bitsandbytes"),
        ("unet", {"quant_method": "torchao"}, "by torchao"),
        ("unet", {"_load_in_4bit": True}, ""),
    ],
)
def test_a_configuration_that_says_so(
    component: str, settings: dict[str, Any], named: str, nano_folder: Folder, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(nano_folder("sd"), tmp_path / "sd"))
    config = json.loads((folder / component / "config.json").read_text())
    (folder / component / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    refused(folder, f"The {component} of .* is quantized.*{named}.*unquantized weights, in float32")


@pytest.mark.parametrize(
    "end",
    ["absmax", "quant_map", "SCB", "qweight", "weight._data", "weight_scale_inv", "weight.quant_state.bnb__nf4"],
)
def test_tensors_that_only_quantised_weights_have(end: str, nano_folder: Folder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(nano_folder("sd"), tmp_path / "sd"))
    save_file({**load((folder / UNET).read_bytes()), f"conv_in.{end}": torch.zeros(2)}, folder / UNET)
    refused(folder, rf"unet is quantized \(.*conv_in\.{end}\): give the unquantized weights")


def test_integers_where_there_should_be_weights(nano_folder: Folder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(nano_folder("sd"), tmp_path / "sd"))
    tensors = load((folder / TEXT).read_bytes())
    name = next(name for name in tensors if name.endswith("fc1.weight"))
    save_file({**tensors, name: (tensors[name] * 127).to(torch.int8)}, folder / TEXT, {"format": "pt"})
    refused(folder, r"The text_encoder of .* is quantized \(.*fc1.weight is torch.int8\)")
    save_file({**tensors, name.replace("weight", "weight_scale"): torch.ones(3)}, folder / TEXT)
    refused(folder, r"weight_scale is \[3\], not one for each row")
    save_file({**tensors, "other.weight_scale": torch.ones(1)}, folder / TEXT)
    refused(folder, "other.weight_scale scales no weight")


def test_gguf(nano_folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "flux1-dev-Q4_K.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "flux1-dev-Q4_K.gguf", r"is quantized \(GGUF\): give a diffusers folder")
    folder = Path(shutil.copytree(nano_folder("sd"), tmp_path / "sd"))
    (folder / UNET).rename(folder / "unet" / "model.gguf")
    refused(folder, r"model.gguf is quantized \(GGUF\): give unquantized weights")

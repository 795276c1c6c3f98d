"""Layers that LoRA files name as the original layouts do, and text encoders: merged as diffusers does both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, StableDiffusionPipeline
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from lora_cases import QUERY, Merged, low_rank
from safetensors.torch import save_file
from torch import Tensor, nn

from erasediff.config import Config
from erasediff.errors import UserError
from erasediff.models import lora
from erasediff.models.family import family_named
from erasediff.models.flux import FLUX_1_DEV
from erasediff.models.load import load_text_to_image
from erasediff.models.lora_keys import layers, names_in_files
from erasediff.workflows.load_model import load_checkpoint, read_denoiser

pytestmark = pytest.mark.usefixtures("one_thread")
Folder = Callable[[str], Path]


def empty(cls: Any, config: dict[str, Any]) -> Any:
    with init_empty_weights():
        return cls.from_config(config)


FLUX = {**FLUX_1_DEV, "num_layers": 1, "num_single_layers": 1}
SD35 = {"num_layers": 2, "num_attention_heads": 4, "dual_attention_layers": (0,), "caption_projection_dim": 256}


@pytest.mark.parametrize(
    ("family", "cls", "config", "convert", "others"),
    [
        ("flux", FluxTransformer2DModel, FLUX, convert_flux_transformer_checkpoint_to_diffusers, ".norm.{}_norm.scale"),
        ("sd3", SD3Transformer2DModel, SD35, convert_sd3_transformer_checkpoint_to_diffusers, "pos_embed"),
    ],
)
def test_original_names_are_those_diffusers_converts(
    family: str, cls: Any, config: dict[str, Any], convert: Any, others: str
) -> None:
    module = empty(cls, config)
    names = names_in_files({"transformer": module}, family_named(family))
    rows = {name: layer.weight.shape[0] for name, layer in layers(module)}
    prefix = "model.diffusion_model."
    same = {f"{prefix}context_embedder"} if family == "sd3" else set()
    originals = {
        name: targets
        for name, targets in names.items()
        if name.startswith(prefix) and (name in same or name.removeprefix(prefix) not in rows)
    }
    checkpoint = {
        f"{name}.weight": torch.randn(sum(rows[target.layer] for target in targets), 1)
        for name, targets in originals.items()
    }
    checkpoint |= {name.replace(".weight", ".bias"): value[:, 0] for name, value in checkpoint.items()}
    blocks = [f"{prefix}double_blocks.0.{side}_attn" for side in ("img", "txt")] + [f"{prefix}single_blocks.0"]
    extra = [f"{block}{others.format(kind)}" for block in blocks for kind in ("query", "key")]
    extra = extra if family == "flux" else [others]
    theirs = convert({**checkpoint, **{name: torch.zeros(1) for name in extra}})
    converted = {target.layer for targets in originals.values() for target in targets}
    assert converted == {name for name, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    for name, targets in originals.items():
        for target in targets:
            weight = checkpoint[f"{name}.weight"]
            own = weight if target.rows is None else target.rows.of(weight)
            assert torch.equal(own, theirs[f"{target.layer}.weight"])


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("flux", "lora_unet_double_blocks_0_txt_attn_qkv"),
        ("flux", "diffusion_model.single_blocks.0.linear1"),
        ("sd3", "lora_unet_joint_blocks_0_context_block_attn_qkv"),
    ],
)
def test_one_adapter_for_queries_keys_and_values(
    family: str, name: str, dora: bool, nano_folder: Folder, tmp_path: Path
) -> None:
    if "single" in name:
        members = [
            f"single_transformer_blocks.0.{layer}" for layer in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        ]
    else:
        members = [f"transformer_blocks.0.attn.add_{letter}_proj" for letter in "qkv"]
    total = 7 * 32 if "single" in name else 3 * 32
    down, up = low_rank(total, 32)
    magnitude = torch.rand(total, 1) + 0.5
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    if dora:
        tensors[f"{name}.dora_scale"] = magnitude
    merged = Merged(nano_folder(family), tensors, tmp_path / "x.safetensors")
    whole = torch.cat([merged.before[f"{member}.weight"] for member in members]) + up @ down / 2
    if dora:
        whole = magnitude * whole / whole.norm(dim=1, keepdim=True)
    parts = whole.split([merged.before[f"{member}.weight"].shape[0] for member in members])
    merged.assert_changed({f"{member}.weight": part for member, part in zip(members, parts, strict=True)})
    save_file({**tensors, f"{name}.lora_up.weight": up[1:].clone()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"is of another size|not one value for each"):
        lora.merge_file(load_text_to_image(nano_folder(family)), tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("family", "component", "layer", "name"),
    [
        (
            "sd",
            "text_encoder",
            "encoder.layers.1.self_attn.q_proj",
            "lora_te_text_model_encoder_layers_1_self_attn_q_proj",
        ),
        ("sd", "text_encoder", "encoder.layers.1.mlp.fc1", "text_encoder.text_model.encoder.layers.1.mlp.fc1"),
        (
            "sd",
            "text_encoder",
            "encoder.layers.0.self_attn.out_proj",
            "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora",
        ),
        ("sdxl", "text_encoder", "encoder.layers.1.mlp.fc2", "lora_te1_text_model_encoder_layers_1_mlp_fc2"),
        ("sdxl", "text_encoder_2", "encoder.layers.1.mlp.fc2", "lora_te2_text_model_encoder_layers_1_mlp_fc2"),
        (
            "flux",
            "text_encoder_2",
            "encoder.block.1.layer.0.SelfAttention.q",
            "lora_te3_encoder_block_1_layer_0_SelfAttention_q",
        ),
        (
            "sd3",
            "text_encoder_3",
            "encoder.block.1.layer.0.SelfAttention.q",
            "text_encoder_3.encoder.block.1.layer.0.SelfAttention.q",
        ),
    ],
)
def test_text_encoders(
    family: str, component: str, layer: str, name: str, nano_folder: Folder, tmp_path: Path
) -> None:  # fmt: skip
    plain: Any = load_text_to_image(nano_folder(family))
    original = {key.removeprefix("text_model."): value for key, value in plain.encoders[component].state_dict().items()}
    weight = original[f"{layer}.weight"]
    down, up = low_rank(*weight.shape)
    ends = (".down.weight", ".up.weight") if name.endswith("_lora") else (".lora_down.weight", ".lora_up.weight")
    tensors = {name + ends[0]: down, name + ends[1]: up, f"{name}.alpha": torch.tensor(1.0)}
    merged = Merged(nano_folder(family), tensors, tmp_path / "x.safetensors")
    merged.assert_changed({})
    assert merged.model.hash != merged.hash
    merged.model.save(tmp_path / "out")
    for model in (merged.model, load_text_to_image(tmp_path / "out")):
        assert model.hash == merged.model.hash
        own = {key.removeprefix("text_model."): value for key, value in model.encoders[component].state_dict().items()}
        for key, value in original.items():
            if key == f"{layer}.weight":
                torch.testing.assert_close(own[key], value + up @ down / 2)
            else:
                assert torch.equal(own[key], value)


def test_denoiser_and_text_encoder_as_diffusers_merges_them(nano_folder: Folder, tmp_path: Path) -> None:
    # All of its attention, without which diffusers does not know what it reads.
    text = [
        f"lora_te_text_model_encoder_layers_0_self_attn_{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    ]
    tensors: dict[str, Tensor] = {}
    for number, (name, size) in enumerate(
        [(f"lora_unet_{QUERY.replace('.', '_')}", 16), *((name, 32) for name in text)]
    ):
        down, up = low_rank(size, size, seed=number)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(3.0)}
    merged = Merged(nano_folder("sd"), tensors, tmp_path / "x.safetensors")
    theirs = StableDiffusionPipeline.from_pretrained(nano_folder("sd"))
    theirs.load_lora_weights(tmp_path, weight_name="x.safetensors")
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    for own, other in (
        (merged.model.denoiser, theirs.unet),
        (merged.model.encoders["text_encoder"], theirs.text_encoder),
    ):
        for (name, value), expected in zip(own.state_dict().items(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(value, expected, msg=name)


def test_a_denoiser_that_is_read_later(nano_folder: Folder, tmp_path: Path) -> None:
    """Text encoders are changed once, when the model is opened, the denoiser when its weights are read."""
    path = tmp_path / "x.safetensors"
    tensors: dict[str, Tensor] = {}
    text = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    for name, size in ((f"lora_unet_{QUERY.replace('.', '_')}", (16, 16)), (text, (64, 32))):
        down, up = low_rank(*size)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    merged = Merged(nano_folder("sd"), tensors, path)
    config = Config.model_validate({"text_to_image": {"lora": path}})
    model = load_checkpoint(config, nano_folder("sd"), torch.device("cpu"), empty=True)
    assert model.hash == merged.model.hash
    read_denoiser(config, model)
    assert model.hash == merged.model.hash
    assert model.denoiser_hash() == merged.model.denoiser_hash()
    save_file({**tensors, f"{text}.oft_blocks": torch.ones(2)}, path)
    with pytest.raises(UserError, match="oft_blocks, which cannot be applied here"):
        load_checkpoint(config, nano_folder("sd"), torch.device("cpu"), empty=True)

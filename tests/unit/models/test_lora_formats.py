"""LoRA files of every format, merged wholly, each against its formula; what is not applied is refused by name."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_cases import BLOCK, CONV, POINT, QUERY, Merged, low_rank
from peft import LoHaConfig, LoKrConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from erasediff.errors import UserError
from erasediff.models import lora
from erasediff.models.load import load_text_to_image

pytestmark = pytest.mark.usefixtures("one_thread")
Folder = Callable[[str], Path]


@pytest.fixture
def sd(nano_folder: Folder, tmp_path: Path) -> Callable[..., Merged]:
    return lambda tensors, metadata=None: Merged(nano_folder("sd"), tensors, tmp_path / "x.safetensors", metadata)


@pytest.mark.parametrize(
    ("name", "down", "up"),
    [
        (f"unet.{QUERY}", ".lora_A.weight", ".lora_B.weight"),
        (QUERY, ".lora_A.default.weight", ".lora_B.default.weight"),
        (f"diffusion_model.{QUERY}", ".lora_A.weight", ".lora_B.weight"),
        (f"unet.{QUERY}", ".lora.down.weight", ".lora.up.weight"),
        (f"unet.{BLOCK}.attn2.processor.to_q_lora", ".down.weight", ".up.weight"),
        (f"{BLOCK}.attn2.processor.to_q_lora", ".down.weight", ".up.weight"),
        ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_q", ".lora_up.weight", ".lora_down.weight"),
        ("lora_unet_" + QUERY.replace(".", "_"), ".lora_down.weight", ".lora_up.weight"),
        ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_q", ".lora_down.weight", ".lora_up.weight"),
        ("lycoris_" + QUERY.replace(".", "_"), ".lora_down.weight", ".lora_up.weight"),
    ],
)
def test_names_of_one_layer(name: str, down: str, up: str, sd: Any) -> None:
    first, second = low_rank(16, 16)
    if down == ".lora_up.weight":
        down, up = up, down
    merged = sd({name + down: first, name + up: second})
    merged.assert_changed({f"{QUERY}.weight": merged.before[f"{QUERY}.weight"] + second @ first})


def test_to_out_of_attention_processors(sd: Any) -> None:
    down, up = low_rank(16, 16)
    name = f"{BLOCK}.attn1.processor.to_out_lora"
    merged = sd({f"{name}.down.weight": down, f"{name}.up.weight": up})
    weight = f"{BLOCK}.attn1.to_out.0.weight"
    merged.assert_changed({weight: merged.before[weight] + up @ down})


def test_convolutions(sd: Any) -> None:
    """LoRA of a 3 x 3 and a 1 x 1 convolution, as linear or as convolution, and LoCon's three convolutions in a row."""
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 16, 3, 3, generator=generator), torch.randn(16, 2, 1, 1, generator=generator)
    flat_down, flat_up = low_rank(16, 16)
    head, middle, tail = torch.randn(2, 16, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(16, 2, 1, 1)
    other = "mid_block.resnets.0.conv1"
    head, tail = torch.randn(2, 32, 1, 1), torch.randn(32, 2, 1, 1)
    conv, point, tucker = (f"lora_unet_{name.replace('.', '_')}" for name in (CONV, POINT, other))
    merged = sd(
        {
            f"{conv}.lora_down.weight": down,
            f"{conv}.lora_up.weight": up,
            f"{conv}.alpha": torch.tensor(1.0),
            f"{point}.lora_down.weight": flat_down,
            f"{point}.lora_up.weight": flat_up,
            f"{tucker}.lora_down.weight": head,
            f"{tucker}.lora_mid.weight": middle,
            f"{tucker}.lora_up.weight": tail,
        }
    )
    before = merged.before
    # A kernel is what a convolution makes of each input channel's impulse.
    impulse = torch.eye(32)[:, :, None, None]
    padded = nn.functional.conv2d(impulse, head)
    response = nn.functional.conv2d(nn.functional.conv2d(padded, middle, padding=2), tail)
    merged.assert_changed(
        {
            f"{CONV}.weight": before[f"{CONV}.weight"] + torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down) / 2,
            f"{POINT}.weight": before[f"{POINT}.weight"] + (flat_up @ flat_down)[:, :, None, None],
            f"{other}.weight": before[f"{other}.weight"] + response.permute(1, 0, 2, 3).flip(2, 3),
        }
    )


@pytest.mark.parametrize("dora", [False, True])
def test_loha_of_lycoris(dora: bool, sd: Any) -> None:
    factors = [*low_rank(16, 16, seed=1)[::-1], *low_rank(16, 16, seed=2)[::-1]]
    kernel = [*low_rank(16, 16 * 9, seed=3)[::-1], *low_rank(16, 16 * 9, seed=4)[::-1]]
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    query, conv = (f"lora_unet_{name.replace('.', '_')}" for name in (QUERY, CONV))
    tensors = {f"{query}.{name}": value for name, value in zip(names, factors, strict=True)}
    tensors |= {f"{conv}.{name}": value for name, value in zip(names, kernel, strict=True)}
    tensors[f"{query}.alpha"] = torch.tensor(0.5)
    magnitude = torch.rand(16, 1) + 0.5
    if dora:
        tensors[f"{query}.dora_scale"] = magnitude
    merged = sd(tensors)
    weight = merged.before[f"{QUERY}.weight"] + 0.25 * (factors[0] @ factors[1]) * (factors[2] @ factors[3])
    if dora:
        weight = magnitude * weight / weight.norm(dim=1, keepdim=True)
    product = ((kernel[0] @ kernel[1]) * (kernel[2] @ kernel[3])).reshape(16, 16, 3, 3)
    merged.assert_changed({f"{QUERY}.weight": weight, f"{CONV}.weight": merged.before[f"{CONV}.weight"] + product})


def test_lokr_of_lycoris(sd: Any) -> None:
    """Both factors whole, which takes no scale; one of two factors; a convolution in both forms."""
    key, value = f"{BLOCK}.attn1.to_k", f"{BLOCK}.attn1.to_v"
    names = {layer: f"lora_unet_{layer.replace('.', '_')}" for layer in (QUERY, key, value, CONV)}
    first = torch.randn(4, 4)
    down, up = low_rank(4, 4)
    kernel = torch.randn(4, 4, 3, 3)
    tucker, left, right = torch.randn(2, 2, 3, 3), torch.randn(2, 8), torch.randn(2, 8)
    conv = "down_blocks.0.resnets.0.conv2"
    names[conv] = f"lora_unet_{conv.replace('.', '_')}"
    outer = torch.randn(2, 2)
    merged = sd(
        {
            f"{names[QUERY]}.lokr_w1": first,
            f"{names[QUERY]}.lokr_w2": first.T,
            f"{names[QUERY]}.alpha": torch.tensor(1e10),
            f"{names[key]}.lokr_w1": first,
            f"{names[key]}.lokr_w2_a": up,
            f"{names[key]}.lokr_w2_b": down,
            f"{names[key]}.alpha": torch.tensor(1.0),
            f"{names[CONV]}.lokr_w1": first,
            f"{names[CONV]}.lokr_w2": kernel,
            f"{names[conv]}.lokr_w1": outer,
            f"{names[conv]}.lokr_t2": tucker,
            f"{names[conv]}.lokr_w2_a": left,
            f"{names[conv]}.lokr_w2_b": right,
        }
    )
    before = merged.before
    inner = torch.einsum("ijkl,ip,jr->prkl", tucker, left, right)
    merged.assert_changed(
        {
            f"{QUERY}.weight": before[f"{QUERY}.weight"] + torch.kron(first, first.T.contiguous()),
            f"{key}.weight": before[f"{key}.weight"] + torch.kron(first, up @ down) / 2,
            f"{CONV}.weight": before[f"{CONV}.weight"] + torch.kron(first[:, :, None, None], kernel),
            f"{conv}.weight": before[f"{conv}.weight"] + torch.kron(outer[:, :, None, None], inner.contiguous()),
        }
    )


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
def test_loha_and_lokr_of_peft(config: Any, tucker: bool, nano: Any, nano_folder: Folder, tmp_path: Path) -> None:
    model: Any = load_text_to_image(nano_folder("sd"))
    theirs = copy.deepcopy(model.denoiser)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = config(
            r=2,
            alpha=3,
            target_modules=["to_q", "conv1"],
            use_effective_conv2d=tucker,
            rank_pattern={"mid_block.*to_q": 1},
            alpha_pattern={"attn2.to_q": 8},
        )
        adapted = get_peft_model(theirs, settings)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "hada" in name or "lokr" in name:
                    parameter.copy_(torch.rand_like(parameter) * 0.5 + 0.1)
        adapted.save_pretrained(tmp_path)
        expected = adapted.merge_and_unload().state_dict()
    lora.merge_file(model, tmp_path / "adapter_model.safetensors")
    own = model.denoiser.state_dict()
    assert own.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(own[name], value, rtol=1e-5, atol=1e-5)


def test_full_differences_and_norms(sd: Any) -> None:
    norm = f"{BLOCK}.norm1"
    query, layer = (f"lora_unet_{name.replace('.', '_')}" for name in ("conv_in", norm))
    down, up = low_rank(16, 16)
    out = f"{BLOCK}.attn1.to_out.0"
    tensors = {
        f"{query}.diff": torch.randn(16, 4, 3, 3),
        f"{query}.diff_b": torch.randn(16),
        f"{layer}.w_norm": torch.randn(16),
        f"{layer}.b_norm": torch.randn(16),
        f"unet.{out}.lora_A.weight": down,
        f"unet.{out}.lora_B.weight": up,
        f"unet.{out}.diff_b": torch.randn(16),
    }
    merged = sd(tensors)
    changes = {
        "conv_in.weight": tensors[f"{query}.diff"],
        "conv_in.bias": tensors[f"{query}.diff_b"],
        f"{norm}.weight": tensors[f"{layer}.w_norm"],
        f"{norm}.bias": tensors[f"{layer}.b_norm"],
        f"{out}.weight": up @ down,
        f"{out}.bias": tensors[f"unet.{out}.diff_b"],
    }
    merged.assert_changed({name: merged.before[name] + change for name, change in changes.items()})


@pytest.mark.parametrize(
    ("key", "shape", "match"),
    [
        (
            "unet.conv_in.oft_blocks",
            (2, 2),
            "holds unet.conv_in.oft_blocks, which cannot be applied here: merge the LoRA",
        ),
        (f"unet.{QUERY}.scalar", (1,), "scalar, which cannot be applied"),
        (f"unet.{BLOCK}.norm1.lora_A.weight", (2, 16), "lacks the other half"),
        (
            "lora_te_text_model_encoder_layers_7_mlp_fc1.lora_up.weight",
            (2, 2),
            "this one has no lora_te_text_model_encoder",
        ),
        ("lora_te2_text_model_encoder_layers_1_mlp_fc1.lora_up.weight", (2, 2), "this one has no lora_te2_"),
        (f"unet.{QUERY}.hada_w1_a", (16, 2), "the parts of .*hada_w1_a do not fit each other"),
        (f"unet.{QUERY}.lokr_w1", (4, 4), "the parts of .*lokr_w1 do not fit each other"),
        (f"unet.{QUERY}.diff", (), "a difference of .*to_q is one number"),
        (f"unet.{BLOCK}.attn1.to_q.diff", (16, 8), "attn1.to_q is of another size"),
        (f"unet.{BLOCK}.attn1.to_q.diff_b", (16,), "adds to the bias of .*attn1.to_q, which has none"),
        ("unet.conv_in.diff_b", (8,), "bias of conv_in is of another size"),
        (f"lora_unet_{QUERY.replace('.', '_')}.lora_down.weight", (2, 8), "of another size"),
        (f"unet.{QUERY}.lora_down.weight", (2, 16), "contradicts itself: .* are the same part"),
        ("emb_params", (2, 2), "holds emb_params"),
        (f"unet.{QUERY}.dora_scale", (1, 16), r"is \[1, 16\], not one value for each of its 16 outputs"),
    ],
)
def test_what_is_not_applied_is_named_and_changes_nothing(
    key: str, shape: tuple[int, ...], match: str, nano_folder: Folder, tmp_path: Path
) -> None:
    down, up = low_rank(16, 16)
    tensors = {f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up, key: torch.ones(shape)}
    if key.startswith("lora_unet"):
        tensors[key.replace("lora_down", "lora_up")] = up.clone()
    save_file(tensors, tmp_path / "x.safetensors")
    model: Any = load_text_to_image(nano_folder("sd"))
    before = (model.denoiser_hash(), model.hash)
    with pytest.raises(UserError, match=match) as caught:
        lora.merge_file(model, tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)
    assert (model.denoiser_hash(), model.hash) == before


def test_values_that_are_not_finite(nano_folder: Folder, tmp_path: Path) -> None:
    down, up = low_rank(16, 16)
    up[0, 0] = torch.nan
    save_file({f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"values that are not finite, in unet\..*lora_B.weight: give another LoRA"):
        lora.merge_file(load_text_to_image(nano_folder("sd")), tmp_path / "x.safetensors")


def test_what_cannot_be_trained_on_is_not_loaded(nano: Any, tmp_path: Path) -> None:
    unet = nano.sd().unet
    save_file({"unet.conv_in.diff": torch.ones(16, 4, 3, 3)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"changes conv_in by more than an adapter: merge it with lora.merge_file"):
        lora.load(unet, tmp_path / "x.safetensors", family="sd")


def test_other_kinds_of_peft_are_named(nano_folder: Folder, tmp_path: Path) -> None:
    down, up = low_rank(16, 16)
    name = f"base_model.model.{QUERY}"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "x.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "OFT", "r": 2}))
    with pytest.raises(UserError, match="was trained with peft_type='OFT', which cannot be applied here"):
        lora.merge_file(load_text_to_image(nano_folder("sd")), tmp_path / "x.safetensors")


def test_factors_of_two_forms_at_once(nano_folder: Folder, tmp_path: Path) -> None:
    down, up = low_rank(4, 4)
    first = torch.ones(4, 4)
    parts = {"w1": first, "w1_a": up, "w1_b": down, "w2": first.clone()}
    save_file({f"unet.{QUERY}.lokr_{name}": value for name, value in parts.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="do not fit each other"):
        lora.merge_file(load_text_to_image(nano_folder("sd")), tmp_path / "x.safetensors")

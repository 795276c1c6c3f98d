"""The literature's subsets of weights, counted at full size, and errors for empty selections."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from erasediff.errors import UserError
from erasediff.models.checkpoint.components import empty_module
from erasediff.models.checkpoint.default_configs import KNOWN_CONFIGS
from erasediff.models.trainable import select, train_only


def unet(layout: str) -> nn.Module:
    configs = KNOWN_CONFIGS[layout]
    checkpoint: Any = SimpleNamespace(path="known", index=configs["index"], config=configs.__getitem__)
    return empty_module(checkpoint, "unet")


@pytest.fixture(scope="module")
def sd15() -> nn.Module:
    return unet("sd1")


def count(module: nn.Module, names: list[str]) -> int:
    parameters = dict(module.named_parameters())
    return sum(parameters[name].numel() for name in names)


def test_cross_attention_of_stable_diffusion_has_the_published_size(sd15: nn.Module) -> None:
    assert count(sd15, select(sd15, "xattn-kv")) == 19_169_280
    assert count(sd15, select(sd15, "xattn")) == 43_962_560
    assert count(sd15, select(sd15, "full")) == 859_520_964


@pytest.mark.parametrize("layout", ["sd1", "sd2", "sdxl"])
def test_subsets_of_a_unet(layout: str) -> None:
    module = unet(layout)
    chosen = {
        spec: set(select(module, spec)) for spec in ("full", "xattn", "xattn-kv", "noxattn", "selfattn", "notime")
    }
    assert chosen["xattn-kv"] < chosen["xattn"]
    assert all(name.split(".")[-2] in ("to_k", "to_v") for name in chosen["xattn-kv"])
    assert not chosen["xattn"] & (chosen["noxattn"] | chosen["selfattn"])
    assert chosen["notime"] == chosen["noxattn"] | chosen["xattn"]
    assert chosen["selfattn"] < chosen["noxattn"]
    left = {name.split(".")[0] for name in chosen["full"] - chosen["notime"]}
    assert left == {"conv_norm_out", "conv_out", "time_embedding"} | ({"add_embedding"} if layout == "sdxl" else set())
    assert any("time_emb_proj" in name for name in chosen["noxattn"])


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_subsets_of_joint_attention(name: str, nano: Any) -> None:
    module = nano.NANO[name]().transformer
    text, image = select(module, "xattn"), select(module, "selfattn")
    assert {part.split(".")[-2] for part in select(module, "xattn-kv")} == {"add_k_proj", "add_v_proj"}
    assert any(".to_q." in part for part in image)
    assert not set(text) & set(image)
    assert not any(part.startswith(("norm_out", "proj_out", "time_text_embed")) for part in select(module, "notime"))
    assert set(select(module, "noxattn")) == set(select(module, "notime")) - set(text)


def test_regular_expression(sd15: nn.Module) -> None:
    chosen = select(sd15, r"re:^mid_block\..*to_q")
    assert len(chosen) == 2
    assert all("mid_block" in name and "to_q" in name for name in chosen)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("xatn", "did you mean xattn"),
        ("xattn-vk", "did you mean xattn-kv"),
        ("everything", "give one of full, xattn"),
        ("re:(", "is not a regular expression"),
        ("re:attn3", "matches no weight of this model; near matches are attn1, attn2"),
        ("re:down_block_0", "near matches are .*down_blocks"),
        ("re:^$", "its weights are named like conv_in.weight"),
    ],
)
def test_selection_of_nothing_is_an_error_that_helps(sd15: nn.Module, spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        select(sd15, spec)


def test_model_without_cross_attention() -> None:
    with pytest.raises(UserError, match="'xattn' matches no weight"):
        select(nn.Sequential(nn.Linear(2, 2)), "xattn")


def test_all_else_is_frozen(nano: Any) -> None:
    module = nano.sd().unet
    names = select(module, "xattn")
    parameters = train_only(module, names)
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    assert list(trained) == names
    assert all(own is value for own, value in zip(parameters, trained.values(), strict=True))
    with pytest.raises(ValueError, match="no parameter 'x'"):
        train_only(module, ["x"])

"""Mapping between the names of SD3's and FLUX.1's transformers in diffusers and in the original layout.

The originals hold queries, keys and values in one weight, FLUX's single blocks with the first half of their MLP behind
them, and have shift before scale where diffusers' last modulation has scale before shift. Sources: the modules of
Stability-AI/sd3.5 and of black-forest-labs/flux.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from erasediff.models.checkpoint.original_layout import Place

PREFIX = "model.diffusion_model."
ATTENTION = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
FLUX_OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
    **{
        f"time_text_embed.{ours}_embedder.linear_{number}": f"{theirs}_in.{side}_layer"
        for ours, theirs in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance"))
        for number, side in ((1, "in"), (2, "out"))
    },
}
FLUX_BLOCK = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
SD3_OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    **{
        f"time_text_embed.{ours}_embedder.linear_{number}": f"{theirs}_embedder.mlp.{2 * number - 2}"
        for ours, theirs in (("timestep", "t"), ("text", "y"))
        for number in (1, 2)
    },
}
SD3_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}


def flux(name: str, config: Any) -> Place | None:
    """The place of a weight or bias of FLUX.1's transformer; an ``original_layout.Table``."""
    layer, _, kind = name.rpartition(".")
    match layer.split("."):
        case ["norm_out", "linear"]:
            return _place("final_layer.adaLN_modulation.1", kind, swapped=True)
        case ["transformer_blocks", block, "attn", projection] if projection in ATTENTION:
            side = "img" if projection.startswith("to") else "txt"
            return _joined(f"double_blocks.{block}.{side}_attn.qkv", kind, projection)
        case ["transformer_blocks", block, *rest]:
            return _within(f"double_blocks.{block}", ".".join(rest), kind, FLUX_BLOCK)
        case ["single_transformer_blocks", block, "attn", projection] if projection in ATTENTION:
            return _joined(f"single_blocks.{block}.linear1", kind, projection)
        case ["single_transformer_blocks", block, "proj_mlp"]:
            return Place(f"{PREFIX}single_blocks.{block}.linear1.{kind}", "joined", 3)
        case ["single_transformer_blocks", block, *rest]:
            inner = {"proj_out": "linear2", "norm.linear": "modulation.lin"}
            return _within(f"single_blocks.{block}", ".".join(rest), kind, inner)
    return _place(FLUX_OUTSIDE.get(layer), kind)


def sd3(name: str, config: Any) -> Place | None:
    """The place of a weight or bias of SD3's transformer; an ``original_layout.Table``."""
    layer, _, kind = name.rpartition(".")
    match layer.split("."):
        case ["norm_out", "linear"]:
            return _place("final_layer.adaLN_modulation.1", kind, swapped=True)
        case ["transformer_blocks", block, ("attn" | "attn2") as attention, projection] if projection in ATTENTION:
            side = "x" if projection.startswith("to") else "context"
            return _joined(f"joint_blocks.{block}.{side}_block.{attention}.qkv", kind, projection)
        case ["transformer_blocks", block, "norm1_context", "linear"] if int(block) == config["num_layers"] - 1:
            # The last block's text goes no further: its modulation has no gates, as that of the output.
            return _place(f"joint_blocks.{block}.context_block.adaLN_modulation.1", kind, swapped=True)
        case ["transformer_blocks", block, *rest]:
            return _within(f"joint_blocks.{block}", ".".join(rest), kind, SD3_BLOCK)
    return _place(SD3_OUTSIDE.get(layer), kind)


def _place(layer: str | None, kind: str, *, swapped: bool = False) -> Place | None:
    return None if layer is None else Place(f"{PREFIX}{layer}.{kind}", "swapped" if swapped else "same")


def _within(block: str, layer: str, kind: str, inner: Mapping[str, str]) -> Place | None:
    return Place(f"{PREFIX}{block}.{inner[layer]}.{kind}") if layer in inner else None


def _joined(layer: str, kind: str, projection: str) -> Place:
    return Place(f"{PREFIX}{layer}.{kind}", "joined", ATTENTION.index(projection) % 3)

"""Mapping between the names of a diffusers folder and the keys of a single file of the original layout.

One table per network gives the place of a diffusers name; both directions follow it, so a round trip keeps every bit.
Sources: the modules of CompVis/stable-diffusion and Stability-AI/generative-models (UNet, VAE), of OpenAI's CLIP in
transformers, and of LAION's OpenCLIP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from erasediff.io.tensor_file import StoredTensor
from erasediff.models.checkpoint.base import canonical_name


@dataclass(frozen=True, slots=True)
class Place:
    """Key of a weight in the original layout, and the form it has there.

    Attributes:
        key: Key in the single file.
        form: "same"; "conv", a 1x1 convolution where diffusers has a linear layer; "transposed"; "swapped", its
            halves in the other order; or "joined", one of query, key and value, or of more, in one tensor.
        part: Index among query, key and value, for "joined".
    """

    key: str
    form: Literal["same", "conv", "transposed", "swapped", "joined"] = "same"
    part: int = 0


Table = Callable[[str, Any], Place | None]
"""Map a canonical name and the module's ``config`` to a place; None for a weight that the original layout lacks."""

RESNET_OF_UNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ATTENTION_OF_VAE = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
LAYER_OF_OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2"}
OUTSIDE_OF_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def _unet(name: str, config: Any) -> Place | None:
    """A stage of n layers is n + 1 blocks in a row; its change of resolution is the last one, or the end of it."""
    stride = config["layers_per_block"] + 1
    match name.split("."):
        case ["conv_in", *rest]:
            block = "input_blocks.0.0"
        case ["conv_norm_out", *rest]:
            block = "out.0"
        case ["conv_out", *rest]:
            block = "out.2"
        case [("time_embedding" | "add_embedding") as embedding, linear, *rest]:
            block = "time_embed" if embedding == "time_embedding" else "label_emb.0"
            block += ".0" if linear == "linear_1" else ".2"
        case ["mid_block", "resnets", layer, *rest]:
            block = f"middle_block.{2 * int(layer)}"
        case ["mid_block", "attentions", _, *rest]:
            block = "middle_block.1"
        case ["down_blocks", stage, "downsamplers", _, "conv", *rest]:
            block = f"input_blocks.{stride * (int(stage) + 1)}.0.op"
        case ["up_blocks", stage, "upsamplers", _, "conv", *rest]:
            after = 2 if "CrossAttn" in config["up_block_types"][int(stage)] else 1
            block = f"output_blocks.{stride * (int(stage) + 1) - 1}.{after}.conv"
        case ["down_blocks", stage, kind, layer, *rest]:
            block = f"input_blocks.{stride * int(stage) + int(layer) + 1}.{int(kind == 'attentions')}"
        case ["up_blocks", stage, kind, layer, *rest]:
            block = f"output_blocks.{stride * int(stage) + int(layer)}.{int(kind == 'attentions')}"
        case _:
            return None
    return Place(_joined("model.diffusion_model", block, rest, RESNET_OF_UNET))


def _vae(name: str, config: Any) -> Place | None:
    """The original counts the decoder's stages from the image inwards, diffusers from the latent outwards."""
    last = len(config["block_out_channels"]) - 1
    form: Literal["same", "conv"] = "same"
    match name.split("."):
        case [side, ("down_blocks" | "up_blocks") as stages, stage, kind, layer, *rest]:
            way = stages.removesuffix("_blocks")
            index = int(stage) if way == "down" else last - int(stage)
            block = f"{side}.{way}.{index}." + (f"block.{layer}" if kind == "resnets" else f"{way}sample")
        case [side, "mid_block", "resnets", layer, *rest]:
            block = f"{side}.mid.block_{int(layer) + 1}"
        case [side, "mid_block", "attentions", _, part, *rest]:
            block = f"{side}.mid.attn_1.{ATTENTION_OF_VAE[part]}"
            form = "conv" if part != "group_norm" and rest[-1] == "weight" else "same"
            rest = rest[-1:]
        case [side, "conv_norm_out", *rest]:
            block = f"{side}.norm_out"
        case [block, *rest]:
            pass
        case _:
            return None
    return Place(_joined("first_stage_model", block, rest, {"conv_shortcut": "nin_shortcut"}), form)


def _clip(prefix: str, name: str, config: Any) -> Place | None:
    return Place(f"{prefix}.text_model.{name}")


def _open_clip(prefix: str, name: str, config: Any) -> Place | None:
    if name in OUTSIDE_OF_OPEN_CLIP:
        return Place(f"{prefix}.{OUTSIDE_OF_OPEN_CLIP[name]}")
    match name.split("."):
        case ["text_projection", "weight"]:
            return Place(f"{prefix}.text_projection", "transposed")
        case ["encoder", "layers", layer, "self_attn", "out_proj", kind]:
            return Place(f"{prefix}.transformer.resblocks.{layer}.attn.out_proj.{kind}")
        case ["encoder", "layers", layer, "self_attn", projection, kind]:
            part = ("q_proj", "k_proj", "v_proj").index(projection)
            return Place(f"{prefix}.transformer.resblocks.{layer}.attn.in_proj_{kind}", "joined", part)
        case ["encoder", "layers", layer, "mlp", linear, kind]:
            return Place(f"{prefix}.transformer.resblocks.{layer}.mlp.{'c_fc' if linear == 'fc1' else 'c_proj'}.{kind}")
        case ["encoder", "layers", layer, norm, kind]:
            return Place(f"{prefix}.transformer.resblocks.{layer}.{LAYER_OF_OPEN_CLIP[norm]}.{kind}")
    return None


def _joined(prefix: str, block: str, rest: list[str], renamed: Mapping[str, str]) -> str:
    return ".".join([prefix, block, *(renamed.get(word, word) for word in rest[:1]), *rest[1:]])


LAYOUTS: dict[str, dict[str, Table]] = {
    "sd1": {"unet": _unet, "vae": _vae, "text_encoder": partial(_clip, "cond_stage_model.transformer")},
    "sd2": {"unet": _unet, "vae": _vae, "text_encoder": partial(_open_clip, "cond_stage_model.model")},
    "sdxl": {
        "unet": _unet,
        "vae": _vae,
        "text_encoder": partial(_clip, "conditioner.embedders.0.transformer"),
        "text_encoder_2": partial(_open_clip, "conditioner.embedders.1.model"),
    },
}
"""Tables of the components by layout of single files."""


def to_original(table: Table, tensors: Mapping[str, StoredTensor], config: Any) -> dict[str, StoredTensor]:
    """Convert a component's weights from diffusers' names to the keys of the original layout."""
    converted: dict[str, StoredTensor] = {}
    joined: dict[str, dict[int, StoredTensor]] = {}
    for name, tensor in tensors.items():
        place = table(canonical_name(name), config)
        match place:
            case None:
                continue
            case Place(form="conv") if len(tensor.shape) == 2:
                tensor = tensor.reshaped(*tensor.shape, 1, 1)
            case Place(form="transposed"):
                tensor = tensor.transposed()
            case Place(form="joined"):
                joined.setdefault(place.key, {})[place.part] = tensor
                continue
        converted[place.key] = tensor
    return converted | {key: StoredTensor.joined([parts[i] for i in range(3)]) for key, parts in joined.items()}


def from_original(
    table: Table, original: Mapping[str, StoredTensor], names: Iterable[str], config: Any
) -> dict[str, StoredTensor]:
    """Convert from the original layout: the weights ``names`` in diffusers that ``original`` has."""
    converted = {}
    for name in names:
        place = table(canonical_name(name), config)
        if place is None or place.key not in original:
            continue
        tensor = original[place.key]
        match place.form:
            case "conv":
                tensor = tensor.reshaped(*tensor.shape[:2])
            case "transposed":
                tensor = tensor.transposed()
            case "joined":
                tensor = tensor.part(place.part, 3)
        converted[name] = tensor
    return converted

"""Names of a model's layers in LoRA files: of diffusers, peft, kohya, LyCORIS, ComfyUI and the original layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from erasediff.models.checkpoint.base import canonical_name
from erasediff.models.family import ModelFamily
from erasediff.models.lora_update import Rows

PEFT_PREFIX = "base_model.model."
DOTTED = (PEFT_PREFIX, "diffusion_model.", "model.diffusion_model.", "")
"""What may come before a layer's name in the denoiser, beside diffusers' name of the component."""
UNDERSCORED = ("lora_unet_", "lora_transformer_", "lycoris_")
"""What kohya's sd-scripts, OneTrainer and LyCORIS write before a name with underscores in the place of dots."""
PROCESSORS = {"to_out.0": "to_out", "to_q": "to_q", "to_k": "to_k", "to_v": "to_v"} | {
    name: name for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
}
"""Names of diffusers' attention processors that held the adapters before peft, "to_q_lora" in "processor"."""
CLIP_PROCESSORS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


@dataclass(frozen=True, slots=True)
class Target:
    """A layer that an entry of a file changes.

    Attributes:
        component: As in model_index.json.
        layer: Name of the layer in the component's module.
        rows: Its own rows of the entry, where that is for several layers.
    """

    component: str
    layer: str
    rows: Rows | None = None


Names = Mapping[str, tuple[Target, ...]]


def names_in_files(modules: Mapping[str, nn.Module], family: type[ModelFamily]) -> Names:
    """The layers by each name that a file may give them.

    Args:
        modules: The denoiser, and the text encoders that can be changed too, by component.
        family: The model's.
    """
    names: dict[str, tuple[Target, ...]] = {}
    for component, module in modules.items():
        if component == family.denoiser_component:
            names |= _denoiser_names(module, family)
        else:
            for name, _ in layers(module):
                names |= dict.fromkeys(_encoder_names(component, name, family), (Target(component, name),))
    return names


def layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that have a weight of their own, by name."""
    return (
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(getattr(layer, "weight", None), nn.Parameter)
    )


def _denoiser_names(module: Any, family: type[ModelFamily]) -> dict[str, tuple[Target, ...]]:
    component = family.denoiser_component
    own: dict[str, tuple[Target, ...]] = {}
    for name, _ in layers(module):
        own[name] = (Target(component, name),)
    names = _spelled(component, own | _original_names(module, family)) | _spelled(component, own)
    for name, targets in own.items():
        parent, leaf = _split(name, PROCESSORS)
        if leaf is not None:
            names |= dict.fromkeys(
                (f"{prefix}{parent}processor.{leaf}_lora" for prefix in (f"{component}.", "")), targets
            )
        if (kohya := family.kohya_name(name, module)) is not None:
            names["lora_unet_" + kohya.replace(".", "_")] = targets
    return names


def _spelled(component: str, named: Names) -> dict[str, tuple[Target, ...]]:
    return {
        spelling: targets
        for name, targets in named.items()
        for spelling in (
            *(prefix + name for prefix in (f"{component}.", *DOTTED)),
            *(prefix + name.replace(".", "_") for prefix in UNDERSCORED),
        )
    }


def _original_names(module: Any, family: type[ModelFamily]) -> dict[str, tuple[Target, ...]]:
    """Targets by the names of the original layout, where a layer may be a part of a larger one."""
    parts: dict[str, list[tuple[int, str, str, int]]] = defaultdict(list)
    config = getattr(module, "config", None)
    for name, layer in () if config is None else layers(module):
        if place := family.original_place(f"{name}.weight", config):
            original = place.key.removeprefix("model.diffusion_model.").removesuffix(".weight")
            parts[original].append((place.part, name, place.form, layer.weight.shape[0]))
    names = {}
    for original, members in parts.items():
        targets, begin = [], 0
        for _, name, form, rows in sorted(members):
            whole = form not in ("joined", "swapped")
            own = None if whole else Rows(begin, begin + rows, swapped=form == "swapped")
            targets.append(Target(family.denoiser_component, name, own))
            begin += rows
        names[original] = tuple(targets)
    return names


def _encoder_names(component: str, name: str, family: type[ModelFamily]) -> Iterator[str]:
    number = family.text_encoders.index(component) + 1
    numbers = ["", "1"] if number == 1 else [str(number)]
    if number == len(family.text_encoders) == 2:
        # sd-scripts counts FLUX's T5 as SD3's, the third.
        numbers.append("3")
    bare = canonical_name(name)
    for spelling in (bare, f"text_model.{bare}"):
        yield f"{component}.{spelling}"
        yield from (f"lora_te{n}_{spelling.replace('.', '_')}" for n in numbers)
        parent, leaf = _split(spelling, CLIP_PROCESSORS)
        if leaf is not None:
            yield f"{component}.{parent}{leaf}_lora"


def _split(name: str, leaves: Mapping[str, str]) -> tuple[str, str | None]:
    """A layer's parent with its dot, and the leaf's name in a file."""
    for leaf, spelled in leaves.items():
        if name.endswith(f".{leaf}"):
            return name.removesuffix(leaf), spelled
    return name, None

"""LoRA files of peft, diffusers and kohya: each layer's adapter with the scale that its trainer used."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from erasediff.errors import UserError
from erasediff.io.tensor_file import StoredTensor, TensorFile
from erasediff.models.checkpoint.base import read_json

PEFT_PREFIX = "base_model.model."
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_CONFIG = "lora_adapter_metadata"
"""Entry of a file's metadata, JSON: the settings of ``peft.LoraConfig``, each under the component's prefix."""
TEXT_ENCODER_PREFIXES = ("lora_te", "text_encoder")
DOWN_UP = {
    ".lora_A.weight": ".lora_B.weight",
    ".lora_down.weight": ".lora_up.weight",
    ".lora.down.weight": ".lora.up.weight",
}
"""The suffixes of one layer's two halves, in the keys of peft and diffusers, of kohya, and of diffusers before peft."""
BIASES = (".lora_B.bias", ".lora_up.bias")
MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".dora_scale")
OTHER_BASE_WEIGHTS = ("pissa", "corda", "olora", "lora_ga")
"""Values of ``init_lora_weights`` under which peft changes the weights below the adapter too."""
OTHER_ADAPTERS = (
    *("layer_replication", "alora_invocation_tokens", "use_qalora", "arrow_config", "monteclora_config"),
    *("use_bdlora", "kasa_config"),
)
"""Settings of ``peft.LoraConfig`` under which an adapter is no constant addition to a weight."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One layer's adapter: weight + alpha / rank up down, or with ``magnitude`` DoRA's, rescaled row by row.

    Source: LoRA (Hu et al. 2021, eq. 3), rsLoRA (Kalajdzievski 2023: alpha / sqrt(rank), here within ``alpha``), DoRA
    (Liu et al. 2024, eq. 5).

    Attributes:
        down: [rank, in, ...].
        up: [out, rank, ...].
        alpha: The scale times the rank.
        bias: [out], of ``up``: the layer's bias gets it times the scale. None for none.
        magnitude: [out], the norm of each row of the merged weight. None for plain LoRA.
    """

    down: Tensor
    up: Tensor
    alpha: float
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def read_adapters(path: Path, layers: Mapping[str, str], component: str) -> dict[str, Adapter]:
    """The adapters of a LoRA file, by the names of the layers that they adapt.

    A layer's scale is the file's own: its ``alpha``; else peft's settings (``lora_alpha``, ``alpha_pattern``,
    ``rank_pattern``, ``use_rslora``), which diffusers writes into the file and peft beside it; else 1, as diffusers
    takes it.

    Args:
        path: A safetensors file.
        layers: The layers' names by every name that a file may give them.
        component: "unet" or "transformer", as diffusers prefixes names and settings.

    Raises:
        UserError: The file is missing, damaged or no LoRA, is for another model or also for text encoders, or holds
            anything that is not applied.
    """
    file = TensorFile.open(path)
    unused = dict(file.tensors)
    if text := next((key for key in unused if key.startswith(TEXT_ENCODER_PREFIXES)), None):
        raise UserError(
            f"{path} also adapts text encoders, which are not trained here ({text}): give one for the denoiser."
        )
    settings = _settings(file, component)
    adapters = {}
    for key in file.tensors:
        suffix = next((suffix for suffix in DOWN_UP if key.endswith(suffix)), None)
        if suffix is None:
            continue
        base = key.removesuffix(suffix)
        if base not in layers:
            raise UserError(f"{path} is a LoRA for another model: this one has no {base}.")
        adapters[layers[base]] = _adapter(path, unused, base, suffix, layers[base], settings)
    if not adapters and not any("lora" in key for key in unused):
        raise UserError(f"{path} is not a LoRA: it holds no adapter.")
    if unused:
        raise UserError(
            f"{path} holds {next(iter(unused))}, which cannot be applied here: merge the LoRA by the program that made "
            "it, and give the merged model."
        )
    _check_kinds(path, adapters, settings)
    return adapters


def _adapter(
    path: Path, unused: dict[str, StoredTensor], base: str, suffix: str, layer: str, settings: Mapping[str, Any]
) -> Adapter:
    """The adapter under the keys that begin with ``base``, which are taken out of ``unused``."""
    down, up = unused.pop(base + suffix), unused.pop(base + DOWN_UP[suffix], None)
    if up is None or len(up.shape) < 2 or len(down.shape) < 2 or up.shape[1] != down.shape[0]:
        raise UserError(f"{path} is damaged: {base} lacks the other half of its adapter.")
    rank = down.shape[0]
    alpha = _alpha_from_settings(path, layer, rank, settings)
    if stored := unused.pop(f"{base}.alpha", None):
        if alpha is not None and not math.isclose(alpha, float(stored.load()), rel_tol=1e-6):
            raise UserError(
                f"{path} contradicts itself: {base}.alpha is {float(stored.load()):g}, its settings make it {alpha:g}."
            )
        alpha = float(stored.load())
    bias, magnitude = (
        next((unused.pop(base + end) for end in ends if base + end in unused), None) for ends in (BIASES, MAGNITUDES)
    )
    return Adapter(
        down.load(),
        up.load(),
        float(rank) if alpha is None else alpha,
        None if bias is None else _per_row(path, base, bias, up.shape[0]),
        None if magnitude is None else _per_row(path, base, magnitude, up.shape[0], is_peft="lora_A" in suffix),
    )


def _per_row(path: Path, base: str, stored: StoredTensor, rows: int, *, is_peft: bool = False) -> Tensor:
    """[rows] of a vector with any trailing ones, and of peft's magnitude of a convolution, [1, rows, 1, 1]."""
    shape = stored.shape[1:] if is_peft and len(stored.shape) == 4 and stored.shape[0] == 1 else stored.shape
    if shape[0] != rows or math.prod(shape) != rows:
        # Among them DoRA by columns, [1, in], which older files of LyCORIS hold.
        raise UserError(
            f"{path} cannot be applied: a vector of {base} is {list(stored.shape)}, not one value for each of its "
            f"{rows} outputs; merge the LoRA by the program that made it."
        )
    return stored.load().reshape(rows)


def _settings(file: TensorFile, component: str) -> dict[str, Any]:
    """The file's settings of ``peft.LoraConfig``; {} where nothing records any."""
    settings: dict[str, Any] = {}
    if recorded := file.metadata.get(DIFFUSERS_CONFIG):
        try:
            everything = dict(json.loads(recorded))
        except (ValueError, TypeError):
            raise UserError(f"{file.path} is damaged: its {DIFFUSERS_CONFIG} is no JSON object.") from None
        prefix = f"{component}."
        prefixed = {key.removeprefix(prefix): value for key, value in everything.items() if key.startswith(prefix)}
        settings = prefixed or ({} if any("." in key for key in everything) else everything)
    elif any(key.startswith(PEFT_PREFIX) for key in file.tensors):
        beside = file.path.with_name(PEFT_CONFIG)
        if not beside.is_file():
            raise UserError(
                f"{file.path} is a LoRA of peft, whose scale is in {PEFT_CONFIG}: put that file beside it, in the "
                "same folder."
            )
        settings = read_json(beside)
    initial = str(settings.get("init_lora_weights")).lower()
    if other := next((name for name in OTHER_ADAPTERS if settings.get(name)), None) or (
        "init_lora_weights" if initial.startswith(OTHER_BASE_WEIGHTS) else None
    ):
        raise UserError(
            f"{file.path} was trained with {other}={settings[other]!r}, which cannot be applied here: merge the LoRA "
            "by peft, and give the merged model."
        )
    return settings


def _alpha_from_settings(path: Path, layer: str, rank: int, settings: Mapping[str, Any]) -> float | None:
    """The scale times the rank that peft's settings ask for, found as peft finds it; None without settings."""
    if "lora_alpha" not in settings:
        return None
    ranks, alphas = settings.get("rank_pattern") or {}, settings.get("alpha_pattern") or {}
    recorded = ranks.get(get_pattern_key(ranks, layer), settings.get("r", rank))
    if recorded != rank:
        raise UserError(f"{path} is damaged: its settings give {layer} the rank {recorded}, its weights {rank}.")
    alpha = float(alphas.get(get_pattern_key(alphas, layer), settings["lora_alpha"]))
    return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha


def _check_kinds(path: Path, adapters: Mapping[str, Adapter], settings: Mapping[str, Any]) -> None:
    """UserError where some layers are DoRA's and others are not, which no trainer writes."""
    if settings.get("use_dora") or any(adapter.magnitude is not None for adapter in adapters.values()):
        for name, adapter in adapters.items():
            if adapter.magnitude is None:
                raise UserError(f"{path} is damaged: it is a DoRA, and {name} lacks its magnitudes.")


def stored(tensor: Tensor) -> StoredTensor:
    """A tensor in memory as an entry of a file to be written."""
    return StoredTensor(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def adapter_tensors(adapter: Adapter, key: str, *, kohya: bool) -> dict[str, StoredTensor]:
    """The entries of one layer; diffusers' hold the scale within ``up``, since not every reader looks for it."""
    if kohya:
        tensors = {
            f"{key}.lora_down.weight": adapter.down,
            f"{key}.lora_up.weight": adapter.up,
            f"{key}.alpha": torch.tensor(float(adapter.alpha)),
        }
    else:
        tensors = {
            f"{key}.lora_A.weight": adapter.down,
            f"{key}.lora_B.weight": adapter.up * (adapter.alpha / adapter.rank),
        }
    return {name: stored(tensor) for name, tensor in tensors.items()}

"""LoRA files of peft, diffusers, kohya, LyCORIS and ComfyUI: what each layer is changed by, at its trainer's scale."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from erasediff.errors import UserError
from erasediff.io.tensor_file import StoredTensor, TensorFile
from erasediff.models.lora_keys import Names
from erasediff.models.lora_settings import AdapterSettings
from erasediff.models.lora_update import Adapter, Change, hadamard, kronecker

TEXT_ENCODER_PREFIXES = ("lora_te", "text_encoder")
LORA_HALVES = (
    {"down": ".lora_A.weight", "up": ".lora_B.weight"},
    {"down": ".lora_down.weight", "up": ".lora_up.weight"},
    {"down": ".lora.down.weight", "up": ".lora.up.weight"},
    {"down": ".lora_linear_layer.down.weight", "up": ".lora_linear_layer.up.weight"},
    {"down": ".down.weight", "up": ".up.weight"},
)
"""Ends of the keys of peft and diffusers, of kohya, and of diffusers before peft; the shortest last."""
ENDS = {
    **{end: half for halves in LORA_HALVES for half, end in halves.items()},
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    **dict.fromkeys((".lora_B.bias", ".lora_up.bias"), "bias"),
    **dict.fromkeys((".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".dora_scale"), "magnitude"),
    **{f".hada_{part}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{part}": f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **dict.fromkeys((".diff", ".w_norm"), "diff"),
    **dict.fromkeys((".diff_b", ".b_norm"), "diff_b"),
}
"""The parts of a layer's change by the ends of their keys; the last four rows are LyCORIS's and ComfyUI's."""
PRODUCTS = {"hada": hadamard, "lokr": kronecker}
LOW_RANK = {number: {f"w{number}_a", f"w{number}_b"} for number in (1, 2)}
FORMS = {
    "hada": (LOW_RANK[1] | LOW_RANK[2], LOW_RANK[1] | LOW_RANK[2] | {"t1", "t2"}),
    "lokr": tuple(w1 | w2 for w1 in ({"w1"}, LOW_RANK[1]) for w2 in ({"w2"}, LOW_RANK[2], LOW_RANK[2] | {"t2"})),
}
"""The factors that make up each product."""
NAMED_ADAPTER = re.compile(r"\.(lora_[AB]|lora_magnitude_vector)\.default(?=\.|$)")
"""peft names the adapter in a model's own state dict, though not in the files that it saves."""
Updates = dict[tuple[str, str], list[Adapter | Change]]
"""Changes by component and layer."""


def read_updates(path: Path, names: Names, component: str) -> Updates:
    """What a LoRA file changes.

    A layer's scale is the file's own: its ``alpha``; else peft's settings (``lora_alpha``, ``alpha_pattern``,
    ``rank_pattern``, ``use_rslora``), which diffusers writes into the file and peft beside it; else 1, as diffusers
    takes it.

    Args:
        path: A safetensors file.
        names: The layers by every name that a file may give them.
        component: "unet" or "transformer", as diffusers prefixes names and settings.

    Raises:
        UserError: The file is missing, damaged or no LoRA, is for another model or also for text encoders that
            ``names`` lacks, or holds anything that is not applied.
    """
    file = TensorFile.open(path)
    components = {target.component for targets in names.values() for target in targets} | {component}
    text = next((key for key in file.tensors if key.startswith(TEXT_ENCODER_PREFIXES)), None)
    if text is not None and components == {component}:
        raise UserError(
            f"{path} also adapts text encoders, which are not trained here ({text}): give one for the denoiser."
        )
    settings = {name: AdapterSettings.of(file, name) for name in components}
    updates: Updates = {}
    for entry in _entries(file):
        if entry.base not in names:
            if entry.parts.keys() <= {"alpha", "bias", "magnitude", "mid"}:
                raise entry.not_applied()
            raise UserError(f"{path} is a LoRA for another model: this one has no {entry.base}.")
        targets = names[entry.base]
        for update in entry.updates(targets[0].layer, settings[targets[0].component]):
            for target in targets:
                if target.rows is not None and update.outputs != max(t.rows.end for t in targets if t.rows):
                    raise UserError(f"{path} is a LoRA for another model: its {entry.base} is of another size.")
                own = update if target.rows is None else update.rows(target.rows)
                updates.setdefault((target.component, target.layer), []).append(own)
        if entry.parts:
            raise entry.not_applied()
    _check_kinds(path, updates, settings)
    return updates


@dataclass(slots=True)
class _Entry:
    """What a file holds under one name: its parts by kind, and their keys; both shrink as they are used."""

    path: Path
    base: str
    parts: dict[str, StoredTensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def updates(self, layer: str, settings: AdapterSettings) -> Iterator[Adapter | Change]:
        if self.parts.keys() & {"down", "up"}:
            yield self._adapter(layer, settings)
        for kind, product in PRODUCTS.items():
            if any(part.startswith(kind) for part in self.parts):
                yield self._product(kind, product, layer, settings)
        if (stored := self.parts.get("diff")) is not None:
            # Read once to see its values, and again when it is applied: it is as large as the weight.
            self._load("diff")
            if not stored.shape:
                raise UserError(f"{self.path} is damaged: a difference of {self.base} is one number.")
            yield Change(stored.load, (stored.shape[0], math.prod(stored.shape)))
        if (bias := self._load("diff_b")) is not None:
            yield Change(bias=bias)

    def _adapter(self, layer: str, settings: AdapterSettings) -> Adapter:
        is_peft = ".lora_A" in self.keys.get("down", "")
        down, up, mid = (self._load(part) for part in ("down", "up", "mid"))
        if down is None or up is None or down.ndim < 2 or up.ndim < 2 or not up.shape[1] == down.shape[0] > 0:
            raise UserError(f"{self.path} is damaged: {self.base} lacks the other half of its adapter.")
        if mid is not None:
            # A convolution as three: 1 x 1 to the rank, k x k within it, 1 x 1 from it. The first two are one.
            if mid.ndim != 4 or mid.shape[:2] != (len(down), len(down)) or math.prod(down.shape[2:]) != 1:
                raise UserError(f"{self.path} is damaged: {self.base} has a middle that does not fit its adapter.")
            down = torch.einsum("oikl,ic->ockl", mid.float(), down.float().flatten(1))
        alpha = self._alpha(layer, len(down), settings)
        rows = len(up)
        bias, magnitude = self._per_row("bias", rows), self._per_row("magnitude", rows, is_peft=is_peft)
        return Adapter(down, up, float(len(down)) if alpha is None else alpha, bias, magnitude)

    def _product(
        self, kind: str, product: Callable[[Mapping[str, Tensor], float], Tensor], layer: str, settings: AdapterSettings
    ) -> Change:
        names = [part for part in self.parts if part.startswith(kind)]
        first = self.keys[names[0]]
        factors = {name.removeprefix(f"{kind}_"): tensor for name in names if (tensor := self._load(name)) is not None}
        fault = UserError(f"{self.path} is damaged: the parts of {first} do not fit each other.")
        if set(factors) not in FORMS[kind] or any(factor.ndim < 2 or not factor.numel() for factor in factors.values()):
            raise fault
        try:
            # Shapes alone, to refuse a damaged file before anything is multiplied.
            made = product({name: tensor.to("meta") for name, tensor in factors.items()}, 1.0)
        except RuntimeError:
            raise fault from None
        rank = next((len(factors[name]) for name in ("w1_b", "w2_b") if name in factors), None)
        if rank is None:
            # Both factors whole: LyCORIS then takes no scale, and peft the one of its settings.
            self._taken("alpha")
            rank = settings.rank(layer) or 1
            alpha = settings.alpha(layer, rank)
        else:
            alpha = self._alpha(layer, rank, settings)
        scale = 1.0 if alpha is None else alpha / rank
        magnitude = self._per_row("magnitude", len(made))
        return Change(partial(product, factors, scale), (len(made), made.numel()), magnitude=magnitude)

    def _alpha(self, layer: str, rank: int, settings: AdapterSettings) -> float | None:
        alpha = settings.alpha(layer, rank)
        if (stored := self._load("alpha")) is None:
            return alpha
        if stored.numel() != 1:
            raise UserError(f"{self.path} is damaged: {self.base}.alpha is not one number.")
        if alpha is not None and not math.isclose(alpha, float(stored), rel_tol=1e-6):
            raise UserError(
                f"{self.path} contradicts itself: {self.base}.alpha is {float(stored):g}, its settings make it "
                f"{alpha:g}."
            )
        return float(stored)

    def _per_row(self, part: str, rows: int, *, is_peft: bool = False) -> Tensor | None:
        """[rows] of a vector with any trailing ones, and of peft's magnitude of a convolution, [1, rows, 1, 1]."""
        values = self._load(part)
        if values is None:
            return None
        shape = values.shape[1:] if is_peft and values.ndim == 4 and values.shape[0] == 1 else values.shape
        if not shape or shape[0] != rows or math.prod(shape) != rows:
            # Among them DoRA by columns, [1, in], which older files of LyCORIS hold.
            raise UserError(
                f"{self.path} cannot be applied: a vector of {self.base} is {list(values.shape)}, not one value for "
                f"each of its {rows} outputs; merge the LoRA by the program that made it."
            )
        return values.reshape(rows)

    def _load(self, part: str) -> Tensor | None:
        key, stored = self.keys.get(part), self._taken(part)
        if stored is None:
            return None
        if not stored.dtype.is_floating_point and part != "alpha":
            raise UserError(f"{self.path} holds {key} as {stored.dtype}, not as floating point: give another LoRA.")
        tensor = stored.load()
        if not torch.isfinite(tensor.float()).all():
            raise UserError(f"{self.path} holds values that are not finite, in {key}: give another LoRA.")
        return tensor

    def _taken(self, part: str) -> StoredTensor | None:
        self.keys.pop(part, None)
        return self.parts.pop(part, None)

    def not_applied(self) -> UserError:
        return _not_applied(self.path, next(iter(self.keys.values())))


def _not_applied(path: Path, key: str) -> UserError:
    return UserError(
        f"{path} holds {key}, which cannot be applied here: merge the LoRA by the program that made it, and give the "
        "merged model."
    )


def _entries(file: TensorFile) -> list[_Entry]:
    """The file's keys by the names that they begin with. UserError for a key that is no part of an adapter."""
    entries: dict[str, _Entry] = {}
    unknown = []
    for key, stored in file.tensors.items():
        name = NAMED_ADAPTER.sub(r".\1", key)
        end = next((end for end in ENDS if name.endswith(end)), None)
        if end is None:
            unknown.append(key)
            continue
        base = name.removesuffix(end)
        entry = entries.setdefault(base, _Entry(file.path, base))
        if ENDS[end] in entry.parts:
            raise UserError(f"{file.path} contradicts itself: {key} and {entry.keys[ENDS[end]]} are the same part.")
        entry.parts[ENDS[end]], entry.keys[ENDS[end]] = stored, key
    if not entries and not any("lora" in key for key in unknown):
        raise UserError(f"{file.path} is not a LoRA: it holds no adapter.")
    if unknown:
        raise _not_applied(file.path, unknown[0])
    return list(entries.values())


def _check_kinds(path: Path, updates: Updates, settings: Mapping[str, AdapterSettings]) -> None:
    """UserError where some layers are DoRA's and others are not, which no trainer writes."""
    for component in settings:
        adapters = {
            layer: adapter
            for (part, layer), changes in updates.items()
            for adapter in changes
            if part == component and isinstance(adapter, Adapter)
        }
        if settings[component].is_dora or any(adapter.magnitude is not None for adapter in adapters.values()):
            for layer, adapter in adapters.items():
                if adapter.magnitude is None:
                    raise UserError(f"{path} is damaged: it is a DoRA, and {layer} lacks its magnitudes.")

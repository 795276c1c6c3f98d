"""Settings of ``peft.LoraConfig`` that a LoRA file was trained with, from its metadata or the file beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key

from erasediff.errors import UserError
from erasediff.io.json_file import parse_object
from erasediff.io.tensor_file import TensorFile
from erasediff.models.checkpoint.base import read_json
from erasediff.models.lora_keys import PEFT_PREFIX

PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_CONFIG = "lora_adapter_metadata"
"""Entry of a file's metadata, JSON: the settings of ``peft.LoraConfig``, each under the component's prefix."""
OTHER_BASE_WEIGHTS = ("pissa", "corda", "olora", "lora_ga", "loftq")
"""Values of ``init_lora_weights`` under which peft changes the weights below the adapter too."""
OTHER_ADAPTERS = (
    *("layer_replication", "alora_invocation_tokens", "use_qalora", "arrow_config", "monteclora_config"),
    *("use_bdlora", "kasa_config"),
)
"""Settings of ``peft.LoraConfig`` under which an adapter is no constant addition to a weight."""
LONGEST_PATTERN = 500
SLOW_PATTERN = re.compile(r"\)[*+?{]|([*+?{][^*+?{]*){4}")
"""A repeated group, or many repetitions: the regular expressions whose matching may take for ever."""
KINDS = ("LORA", "LOHA", "LOKR")


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """Settings of peft for the adapters of one component.

    Attributes:
        path: The LoRA file.
        values: The settings by peft's names; empty where nothing records any.
    """

    path: Path
    values: Mapping[str, Any]

    @classmethod
    def of(cls, file: TensorFile, component: str) -> AdapterSettings:
        """The settings of a file. UserError where they are missing or damaged, or ask for what cannot be applied."""
        settings = cls(file.path, _read(file, component))
        values = settings.values
        initial = str(values.get("init_lora_weights")).lower()
        kind = str(values.get("peft_type") or "LORA").upper()
        if other := next((name for name in OTHER_ADAPTERS if values.get(name)), None) or (
            "init_lora_weights"
            if initial.startswith(OTHER_BASE_WEIGHTS)
            else "peft_type"
            if kind not in KINDS
            else None
        ):
            raise UserError(
                f"{file.path} was trained with {other}={values[other]!r}, which cannot be applied here: merge the LoRA "
                "by peft, and give the merged model."
            )
        return settings

    @property
    def is_dora(self) -> bool:
        return bool(self.values.get("use_dora"))

    def alpha(self, layer: str, rank: int) -> float | None:
        """The scale of a layer times the rank, found as peft finds it; None without settings."""
        values = self.values
        name = next((name for name in ("lora_alpha", "alpha") if name in values), None)
        if name is None:
            return None
        recorded = self._of_layer("rank_pattern", layer, values.get("r", rank))
        if recorded != rank:
            raise UserError(
                f"{self.path} is damaged: its settings give {layer} the rank {recorded:g}, its weights {rank}."
            )
        alpha = self._of_layer("alpha_pattern", layer, values[name])
        return alpha * math.sqrt(rank) if values.get("use_rslora") else alpha

    def rank(self, layer: str) -> int | None:
        """The rank of a layer whose factors do not show it; None without settings."""
        if "r" not in self.values:
            return None
        rank = int(self._of_layer("rank_pattern", layer, self.values["r"]))
        if rank < 0:
            raise UserError(f"{self.path} is damaged: its settings give {layer} the rank {rank}.")
        return rank

    def _of_layer(self, pattern: str, layer: str, default: Any) -> float:
        values = self.values.get(pattern) or {}
        try:
            if any(len(key) > LONGEST_PATTERN or SLOW_PATTERN.search(key) for key in values):
                raise ValueError("a pattern that may take for ever")
            number = values.get(get_pattern_key(values, layer), default)
            if isinstance(number, bool | str) or not math.isfinite(number):
                raise ValueError("no number")
            return float(number)
        except (AttributeError, TypeError, ValueError, RecursionError, re.error):
            raise UserError(f"{self.path} is damaged: its settings give {layer} no number by {pattern}.") from None


def _read(file: TensorFile, component: str) -> dict[str, Any]:
    if recorded := file.metadata.get(DIFFUSERS_CONFIG):
        try:
            everything = parse_object(recorded)
        except ValueError as error:
            raise UserError(f"{file.path} is damaged: its {DIFFUSERS_CONFIG} is no JSON object ({error}).") from None
        prefix = f"{component}."
        prefixed = {key.removeprefix(prefix): value for key, value in everything.items() if key.startswith(prefix)}
        return prefixed or ({} if any("." in key for key in everything) else everything)
    if not any(key.startswith(PEFT_PREFIX) for key in file.tensors):
        return {}
    beside = file.path.with_name(PEFT_CONFIG)
    if not beside.is_file():
        raise UserError(
            f"{file.path} is a LoRA of peft, whose scale is in {PEFT_CONFIG}: put that file beside it, in the same "
            "folder."
        )
    return read_json(beside)

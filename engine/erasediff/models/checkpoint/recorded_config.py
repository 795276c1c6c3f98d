"""Settings of a model that the original layout has no place for, kept in a single file's metadata.

A reader takes a family's defaults for all that a single file does not say. Where the model's own scheduler, scaling of
latents or trained size is another, the file records it, so that it does not come back as another model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch

from erasediff.errors import UserError
from erasediff.io.json_file import parse_object
from erasediff.io.tensor_file import StoredTensor
from erasediff.models.checkpoint.base import Checkpoint
from erasediff.models.checkpoint.default_configs import KNOWN_CONFIGS

KEY = "erasediff.config"
"""Entry of the metadata: JSON, by component the settings that differ from the defaults of ``KNOWN_CONFIGS``."""
RECORDED = {
    "vae": ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "sample_size", "force_upcast"),
    "unet": ("sample_size",),
    "index": ("force_zeros_for_empty_prompt",),
}
"""The settings that weights do not tell; of the scheduler, it is all of them."""


def record(checkpoint: Checkpoint, layout: str) -> dict[str, str]:
    """The metadata of a single file of ``layout``: ``KEY`` with what differs; {} where nothing does."""
    known = KNOWN_CONFIGS[layout]
    own = {"index": dict(checkpoint.index)}
    own |= {name: checkpoint.config(name) for name in ("vae", "unet", "scheduler")}
    differing: dict[str, dict[str, Any]] = {}
    for component, keys in RECORDED.items():
        defaults = known[component]
        settings = {key: own[component][key] for key in keys if key in own[component]}
        cls = None if component == "index" else getattr(diffusers, defaults["_class_name"])
        if changed := {k: v for k, v in settings.items() if _plain(v) != _plain(defaults.get(k, _default(cls, k)))}:
            differing[component] = changed
    scheduler = {"_class_name": checkpoint.index["scheduler"][1], **_settings(own["scheduler"])}
    if _complete(scheduler) != _complete(known["scheduler"]):
        differing["scheduler"] = scheduler
    return {KEY: json.dumps(differing, sort_keys=True)} if differing else {}


def recorded(metadata: Mapping[str, str], source: Path) -> dict[str, dict[str, Any]]:
    """What ``record`` wrote, by component. UserError where it is damaged."""
    try:
        content = parse_object(metadata.get(KEY, "{}"), infinity=True)
        return {
            str(component): {
                key: value
                for key, value in settings.items()
                if key in RECORDED.get(component, ()) or component == "scheduler"
            }
            for component, settings in content.items()
        }
    except (ValueError, AttributeError):
        raise UserError(f"{source} is damaged: its {KEY} is no configuration.") from None


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _complete(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's configuration with its class and the class's defaults."""
    cls = getattr(diffusers, scheduler["_class_name"])
    defaults = {key: parameter.default for key, parameter in signature(cls.__init__).parameters.items()}
    given = {key: _plain(value) for key, value in scheduler.items() if key in defaults}
    return {"_class_name": scheduler["_class_name"]} | defaults | given


def _default(cls: Any, key: str) -> Any:
    return None if cls is None else signature(cls.__init__).parameters[key].default


def _plain(value: Any) -> Any:
    """A setting as JSON holds it: pairs that came as tuples equal those that came as lists."""
    return list(value) if isinstance(value, tuple) else value


def prediction_markers(scheduler: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Empty entries by which trainers and samplers agreed to know v-prediction and a schedule that ends in pure noise.

    Args:
        scheduler: The scheduler's configuration.
    """
    empty = StoredTensor(torch.float32, (0,), lambda: torch.empty(0))
    marked = {
        "v_pred": scheduler.get("prediction_type") == "v_prediction",
        "ztsnr": scheduler.get("rescale_betas_zero_snr"),
    }
    return {name: empty for name, present in marked.items() if present}

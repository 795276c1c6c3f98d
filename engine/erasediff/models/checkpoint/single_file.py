"""A checkpoint in one .safetensors file of the original layout: SD 1.x, SD 2.x or SDXL."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers

from erasediff.errors import UserError
from erasediff.io.tensor_file import StoredTensor, TensorFile
from erasediff.io.user_file import check_regular
from erasediff.models.checkpoint.base import check_small_files, write_small_files
from erasediff.models.checkpoint.components import MODELSPEC_PREDICTIONS, empty_module, takes_zero_snr
from erasediff.models.checkpoint.default_configs import KNOWN_CONFIGS
from erasediff.models.checkpoint.diffusers_folder import DiffusersFolder
from erasediff.models.checkpoint.hub import clip_tokenizer
from erasediff.models.checkpoint.original_layout import LAYOUTS, from_original
from erasediff.models.checkpoint.quantized import unscaled
from erasediff.models.checkpoint.recorded_config import recorded

SIGNATURES = {
    "sdxl": "conditioner.embedders.1.model.ln_final.weight",
    "sd2": "cond_stage_model.model.ln_final.weight",
    "sd1": "cond_stage_model.transformer.text_model.final_layer_norm.weight",
}
"""Key that only files of each layout have."""


class SingleFile:
    """Single-file checkpoint; implements ``Checkpoint``.

    Args:
        path: The .safetensors file.
        config: Diffusers folder to take configurations and tokenizers from; None for the family's defaults. What the
            file itself records goes before both.
        prediction_type: "epsilon" or "v_prediction"; None if the file or its family determines it.

    Raises:
        UserError: The file is missing, damaged or of no known layout, or one of SD 2.x with an unknown prediction type.
    """

    original: Mapping[str, StoredTensor]

    def __init__(self, path: Path, *, config: Path | None, prediction_type: str | None) -> None:
        self.path = path
        check_regular(path)
        if not path.is_file():
            raise UserError(f"{path} does not exist.")
        file = TensorFile.open(path)
        self.layout = _layout(path, file.tensors)
        self.metadata = file.metadata
        self._recorded = recorded(file.metadata, path)
        # An average of the weights from before the unlearning must not come out with the unlearned ones.
        weights = unscaled(file.tensors, path)
        self.original = {name: tensor for name, tensor in weights.items() if not name.startswith("model_ema.")}
        self._folder = None if config is None else DiffusersFolder(config)
        self.index = self._index()
        scheduler, self._scheduler = self._scheduler_entry(prediction_type)
        self.index["scheduler"] = ["diffusers", scheduler]
        self._tensors: dict[str, dict[str, StoredTensor]] = {}

    def _index(self) -> dict[str, Any]:
        own = self._recorded.get("index", {})
        if self._folder is None:
            return {**KNOWN_CONFIGS[self.layout]["index"], **own, "_diffusers_version": diffusers.__version__}
        # What a single file cannot hold, such as a safety checker, is not there to be saved.
        held = [*LAYOUTS[self.layout], *_tokenizers(LAYOUTS[self.layout]), "scheduler"]
        index = {
            name: value if name in held or not isinstance(value, list) else [None, None]
            for name, value in self._folder.index.items()
        }
        return index | own

    def _scheduler_entry(self, requested: str | None) -> tuple[str, dict[str, Any]]:
        """The scheduler's class and configuration."""
        spec = MODELSPEC_PREDICTIONS.get(self.metadata.get("modelspec.prediction_type", ""))
        prediction_type = requested or spec or ("v_prediction" if "v_pred" in self.original else None)
        if own := self._recorded.get("scheduler"):
            name, config = str(own.get("_class_name")), own
        elif self._folder is not None:
            name, config = str(self.index.get("scheduler", ["", ""])[1]), self._folder.config("scheduler")
        else:
            config = KNOWN_CONFIGS[self.layout]["scheduler"]
            name = config["_class_name"]
            if prediction_type is None and self.layout == "sd2":
                raise UserError(
                    f"{self.path} is a Stable Diffusion 2.x model and does not say if it predicts epsilon (512 pixels) "
                    "or v_prediction (768 pixels): give its prediction type."
                )
        if "ztsnr" in self.original:
            config = {**config, "rescale_betas_zero_snr": True}
            if not takes_zero_snr(name):
                # Such as PNDM. Only trailing timesteps begin at the pure noise of training (Lin et al. 2023, 3.3).
                name = "DDIMScheduler"
                config |= {"_class_name": name, "clip_sample": False, "timestep_spacing": "trailing"}
        return name, {**config, **({"prediction_type": prediction_type} if prediction_type else {})}

    def config(self, component: str) -> dict[str, Any]:
        if component == "scheduler":
            return self._scheduler
        own = self._recorded.get(component, {})
        if self._folder is not None:
            return {**self._folder.config(component), **own}
        config = KNOWN_CONFIGS[self.layout][component]
        if (self.layout, component) == ("sd2", "unet") and self._scheduler["prediction_type"] == "epsilon":
            config = {**config, "sample_size": 64}
        return {**config, **own}

    def header(self, component: str) -> dict[str, str]:
        return {}

    def tensors(self, component: str) -> dict[str, StoredTensor]:
        if component not in self._tensors:
            module = empty_module(self, component)
            names: Iterable[str] = module.state_dict()
            if component.startswith("text_encoder"):
                names = map(_on_disk, names)
            table = LAYOUTS[self.layout][component]
            self._tensors[component] = from_original(table, self.original, names, module.config)
        return self._tensors[component]

    def tokenizer(self, component: str) -> Any:
        if self._folder is not None:
            return self._folder.tokenizer(component)
        openai = self.layout == "sd1" or (self.layout, component) == ("sdxl", "tokenizer")
        return clip_tokenizer("<|endoftext|>" if openai else "!")

    def copy_small_files(self, folder: Path) -> None:
        write_small_files(self, folder)

    def check_small_files(self) -> None:
        check_small_files(self)


def _tokenizers(components: Iterable[str]) -> list[str]:
    return [name.replace("text_encoder", "tokenizer") for name in components if name.startswith("text_encoder")]


def _layout(path: Path, tensors: Mapping[str, StoredTensor]) -> str:
    for layout, key in SIGNATURES.items():
        if key in tensors:
            return layout
    if any("lora" in key for key in tensors):
        raise UserError(f"{path} is a LoRA, not a model: give the model that it belongs to.")
    if any(key.startswith("conditioner.embedders.0.model.") for key in tensors):
        raise UserError(f"{path} is the refiner of SDXL: only its base model can be unlearned here.")
    if any(key.startswith("model.diffusion_model.") for key in tensors):
        raise UserError(
            f"{path} holds a denoiser without a text encoder of SD 1.x, 2.x or SDXL: give a diffusers folder."
        )
    raise UserError(f"{path} is not a single file of SD 1.x, SD 2.x or SDXL: give a diffusers folder.")


def _on_disk(name: str) -> str:
    """Name of a text encoder's weight that every release of transformers reads."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"

"""Which weights of a text-to-image model are trained, and how they are saved."""

from pathlib import Path

import torch
from torch import nn

from erasediff.config import Config
from erasediff.errors import UserError
from erasediff.models import lora
from erasediff.models.family import TextToImageModel
from erasediff.models.selection import select, train_only
from erasediff.runs.folder import MODEL, SINGLE_FILE

ADAPTERS = "lora.safetensors"


def selected_weights(config: Config, network: nn.Module) -> list[str]:
    """Names of the weights that are trained, or that a LoRA is to adapt. UserError for a selection of nothing."""
    settings = config.text_to_image
    return select(network, settings.lora_targets if settings.train == "lora" else settings.train)


def trained_parameters(config: Config, network: nn.Module, selected: list[str]) -> list[nn.Parameter]:
    """The parameters to train, those ``selected`` or adapters of theirs; all others are frozen."""
    settings = config.text_to_image
    if settings.train != "lora":
        return train_only(network, selected)
    return lora.add(network, rank=settings.lora_rank, alpha=settings.lora_alpha, targets=selected, seed=config.seed)


def check_output(config: Config, model: TextToImageModel) -> None:
    """UserError for a layout or keys that the family does not have: better now than when the work is done."""
    settings, training_lora = config.output, config.text_to_image.train == "lora"
    if training_lora and config.text_to_image.saliency is not None:
        raise UserError("Saliency chooses among the model's own weights: leave it away with --train lora.")
    if model.original_layout is not None:
        return
    if settings.layout == "single-file":
        raise UserError(f"A {model.family} model has no single-file layout here: set output.layout to diffusers.")
    if training_lora and settings.lora_keys == "kohya":
        raise UserError(
            f"A LoRA of the family {model.family} has no kohya keys here: set output.lora_keys to diffusers."
        )


def output_name(config: Config) -> str:
    """What the model is called in the run's folder."""
    return MODEL if config.output.layout == "diffusers" else SINGLE_FILE


def save_unlearned(config: Config, model: TextToImageModel, path: Path) -> None:
    """Write the model to ``path``; a LoRA also as a file of its own beside it, and merged into the model."""
    settings = config.output
    if config.text_to_image.train == "lora":
        lora.save(model.denoiser_module, path.with_name(ADAPTERS), family=model.family, keys=settings.lora_keys)
        lora.merge(model.denoiser_module)
    model.save(
        path,
        layout=settings.layout,
        dtype=None if settings.dtype is None else getattr(torch, settings.dtype),
        max_shard_size=settings.max_shard_bytes,
        replace=True,
    )

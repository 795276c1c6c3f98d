"""Which kind of model a checkpoint is, told without opening its weights."""

import json
from pathlib import Path

from erasediff.config import Config, differences
from erasediff.errors import UserError

WEIGHT_FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
SECTIONS = ("images.", "text_to_image.", "output.")


def is_text_to_image(source: Path) -> bool:
    """Whether ``source`` is a file of weights, a folder of no pixel-space model, or a name on the hub."""
    if source.suffix in WEIGHT_FILES:
        return True
    if source.is_dir():
        return _unet_class(source) != "UNet2DModel"
    return not source.exists() and not source.is_absolute() and len(source.parts) == 2


def refuse_text_to_image_settings(config: Config) -> None:
    """UserError for settings that the digits' models have no use for."""
    foreign = [name for name in differences(Config(), config) if name.startswith(SECTIONS)]
    if foreign:
        raise UserError(f"The setting {foreign[0]} is for text-to-image models, which {config.unlearn.model} is not.")


def _unet_class(folder: Path) -> str | None:
    try:
        _, name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["unet"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(name)

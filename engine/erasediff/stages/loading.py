"""Models from disk: one for the digits, checked against them, or a text-to-image checkpoint with what goes on top."""

from pathlib import Path

import torch

from erasediff.config import Config
from erasediff.data import ClassDataset
from erasediff.errors import UserError
from erasediff.models import PixelModel, lora
from erasediff.models.family import TextToImageModel
from erasediff.models.load import load_text_to_image


def load_model(path: Path, dataset: ClassDataset, device: torch.device) -> PixelModel:
    """The model in the diffusers folder ``path``. UserError if it cannot be read or is one of other images."""
    model = PixelModel.load(path, device)
    image_shape = tuple(dataset.train.sample.shape[1:])
    if model.image_shape != image_shape or model.num_classes not in (None, dataset.num_classes):
        raise UserError(
            f"The model in {path} makes {_described(model.image_shape, model.num_classes)}, "
            f"but the data are {_described(image_shape, dataset.num_classes)}."
        )
    return model


def load_checkpoint(config: Config, source: Path, device: torch.device, *, empty: bool = False) -> TextToImageModel:
    """The text-to-image model in ``source``, the LoRA of ``config`` merged into it if there is one.

    empty: see ``load_text_to_image``; not with a LoRA

    UserError for a checkpoint or a LoRA that is missing, damaged, or not for the other.
    """
    settings = config.text_to_image
    model = load_text_to_image(
        source,
        dtype=getattr(torch, settings.weights),
        device=device,
        config=settings.config,
        prediction_type=settings.prediction_type,
        empty=empty,
    )
    if settings.lora is not None:
        lora.load(model.denoiser_module, settings.lora, family=model.family)
        lora.merge(model.denoiser_module)
    return model


def _described(image_shape: tuple[int, ...], num_classes: int | None) -> str:
    classes = "" if num_classes is None else f" in {num_classes} classes"
    return f"images of {' x '.join(map(str, image_shape))}{classes}"

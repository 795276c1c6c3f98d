"""A model from disk, checked against the data it is to be used with."""

from pathlib import Path

import torch

from erasediff.data import ClassDataset
from erasediff.errors import UserError
from erasediff.models import PixelModel


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


def _described(image_shape: tuple[int, ...], num_classes: int | None) -> str:
    classes = "" if num_classes is None else f" in {num_classes} classes"
    return f"images of {' x '.join(map(str, image_shape))}{classes}"

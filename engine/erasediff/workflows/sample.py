"""Draw images from a model, and write them as one grid or as single files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from erasediff.config import Config, SampleConfig, for_text_to_image
from erasediff.data import class_numbers
from erasediff.errors import UserError
from erasediff.evaluation.sampling import sample_images
from erasediff.io.atomic import atomic_directory, atomic_file, check_new
from erasediff.io.disk_room import check_writable
from erasediff.methods.sparse_autoencoder import SaemnesiaConfig
from erasediff.models.base import LatentModel
from erasediff.models.diffusion_model import UnpromptedModel
from erasediff.sae import ConceptEraser
from erasediff.training.job import set_up_device, thread_scope
from erasediff.utils.progress import progress_bar
from erasediff.workflows.load_model import load_checkpoint, load_unprompted


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledImages:
    """``images`` [N, C, H, W] in [-1, 1], ``labels`` int64 [N] or None, and where they were written."""

    images: Tensor
    labels: Tensor | None
    written: Path


@thread_scope()
def sample(
    config: Config, model_path: Path, out: Path, console: Console, *, classes: Sequence[int | str] | None, count: int
) -> SampledImages:
    """Draw ``count`` images of each class (by default of every class), or in all from an unconditional model.

    ``out`` with the ending of an image is one grid, a row or more per class; any other ``out`` is a folder of images.
    UserError for classes that do not exist, and for an ``out`` that is there already.
    """
    check_out(out)
    model = load_unprompted(model_path, set_up_device(config), console, lora_file=config.text_to_image.lora)
    labels = labels_for(model, model_path, classes, count)
    images = draw(config, model, labels, count, console, "Sampling")
    prefixes = [""] * len(images) if labels is None else [f"class-{label}-" for label in labels.tolist()]
    names = [f"{prefix}{number:05d}" for number, prefix in enumerate(prefixes)]
    write_images(images, out, names, columns=count, scale=max(1, 32 // images.shape[-1]))
    return SampledImages(images=images, labels=labels, written=out)


def check_out(out: Path) -> None:
    """UserError for an ``out`` that is there already, and for a format that no grid is written in."""
    is_picture(out)
    check_new(out)
    check_writable(out)


def write_images(images: Tensor, out: Path, names: Sequence[str], *, columns: int, scale: int) -> None:
    """Write ``images`` [N, C, H, W] in [-1, 1] as one grid, or as single images called ``names``; see ``sample``."""
    if is_picture(out):
        with atomic_file(out) as partial:
            sheet = grid(images, min(columns, 25), scale)
            sheet.save(partial, format=PICTURE_FORMATS[out.suffix.lower()])
        return
    with atomic_directory(out) as folder:
        for name, image in zip(names, images, strict=True):
            picture(image).save(folder / f"{name}.png")


PICTURE_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
"""Formats of a grid, by suffix."""


def is_picture(out: Path) -> bool:
    """Return true if ``out`` has the suffix of an image. UserError for a format that no grid is written in."""
    suffix = out.suffix.lower()
    if suffix not in PICTURE_FORMATS and suffix in Image.registered_extensions():
        raise UserError(
            f"A grid of images is not written as {suffix}: choose {', '.join(PICTURE_FORMATS)}, or a folder."
        )
    return suffix in PICTURE_FORMATS


def labels_for(model: UnpromptedModel, path: Path, classes: Sequence[int | str] | None, count: int) -> Tensor | None:
    """``count`` labels of each class, int64 [N], or None for an unconditional model. UserError as in ``sample``."""
    if model.condition == "none":
        if classes is not None:
            raise UserError(f"The model in {path} is unconditional: omit the classes.")
        return None
    if model.num_classes is None:
        raise UserError(
            f"The model in {path} does not say which classes it has: write classes.json into its folder, such as "
            '{"names": ["cat", "dog"], "null_label": null}.'
        )
    if classes is not None and not classes:
        raise UserError(f"Name at least one class of {', '.join(model.class_names)}.")
    chosen = range(model.num_classes) if classes is None else class_numbers(classes, model.class_names, str(path))
    return torch.tensor(chosen).repeat_interleave(count)


def draw(
    config: Config, model: UnpromptedModel, labels: Tensor | None, count: int, console: Console, title: str
) -> Tensor:
    """Images [N, C, H, W] in [-1, 1] of ``labels``, or ``count`` without labels, under a progress bar."""
    settings = latent_defaults(config.sample) if model.space == "latent" else config.sample
    if labels is not None and model.null_label is None and settings.guidance_scale not in (None, 1.0):
        raise UserError("The model has no null label to guide away from: omit --guidance.")
    total = count if labels is None else len(labels)
    with progress_bar(console, title, total) as bar:
        return sample_images(
            model,
            labels,
            total,
            guidance_scale=settings.guidance_scale,
            num_inference_steps=settings.num_inference_steps,
            seed=config.seed,
            batch_size=settings.batch_size,
            progress=bar.advance,
        )


def latent_defaults(settings: SampleConfig) -> SampleConfig:
    """Fill in what the samplers and autoencoders of latent models take, wherever nothing was set."""
    defaults = {"num_inference_steps": 30, "batch_size": 4}
    unset = {name: value for name, value in defaults.items() if name not in settings.model_fields_set}
    return settings.model_copy(update=unset)


def grid(images: Tensor, columns: int, scale: int) -> Image.Image:
    """Grid of ``images`` [N, C, H, W], ``columns`` to a row, a pixel apart, each pixel ``scale`` wide."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = images.new_ones(rows * columns, channels, height + 1, width + 1)
    sheet[:count, :, :height, :width] = images
    sheet = sheet.reshape(rows, columns, channels, height + 1, width + 1).permute(2, 0, 3, 1, 4)
    image = picture(sheet.reshape(channels, rows * (height + 1), columns * (width + 1)))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def picture(image: Tensor) -> Image.Image:
    """Convert an image [C, H, W] in [-1, 1] (1 or 3 channels) as 8-bit grey or RGB."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    return Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy())


@thread_scope()
def sample_prompts(
    config: Config, model_path: Path, out: Path, console: Console, *, prompts: Sequence[str], count: int
) -> SampledImages:
    """Draw ``count`` images of each prompt; ``out`` as in ``sample``. UserError as in ``load_checkpoint``."""
    check_out(out)
    config = for_text_to_image(config)
    settings = config.sample
    model = load_checkpoint(config, model_path, set_up_device(config))
    repeated = [prompt for prompt in prompts for _ in range(count)]
    with erasing(config, model), progress_bar(console, "Sampling", len(repeated)) as bar:
        images = model.sample(
            repeated,
            negative_prompt=settings.negative_prompt,
            guidance_scale=settings.guidance_scale,
            num_inference_steps=settings.num_inference_steps,
            height=config.images.height,
            width=config.images.width,
            seed=config.seed,
            batch_size=settings.batch_size,
            progress=bar.advance,
        )
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    names = [f"prompt-{number // count}-{number:05d}" for number in range(len(repeated))]
    write_images(pixels, out, names, columns=count if count > 1 else len(prompts), scale=1)
    return SampledImages(images=pixels, labels=None, written=out)


@contextmanager
def erasing(config: Config, model: LatentModel) -> Iterator[None]:
    """Attach the eraser ``saemnesia.eraser`` to ``model`` within the block, where there is one."""
    eraser = config.section(SaemnesiaConfig).eraser
    if eraser is None:
        yield
        return
    with ConceptEraser.load(eraser).attached(model.denoiser):
        yield

"""Which images are forgotten and which retained, as ``config.images`` says."""

from functools import partial

from rich.console import Console

from erasediff.config import Config, ImagesConfig
from erasediff.data import (
    CaptionedImage,
    Partition,
    forget_classes,
    forget_files,
    forget_phrases,
    read_images,
    synthesise,
)
from erasediff.errors import UserError
from erasediff.models.family import TextToImageModel
from erasediff.stages.cache import cache_folder


def image_sets(config: Config, model: TextToImageModel, console: Console) -> Partition:
    """Both sets; images for prompts are made by ``model`` now, unless the cache has them. UserError as below."""
    settings = config.images
    forget, retain = listed_images(settings)
    make = partial(_made, config, model, console)
    return Partition([*forget, *make(settings.forget_prompts)], [*retain, *make(settings.retain_prompts)])


def listed_images(settings: ImagesConfig) -> Partition:
    """The images that are there already, none of them opened.

    UserError for images that cannot be listed or lack captions, a choice that fits none, and, prompts counted, a set
    that comes out empty.
    """
    read = partial(
        read_images, split=settings.split, caption_column=settings.caption_column, template=settings.caption_template
    )
    forget, retain = _chosen(settings, read(settings.data)) if settings.data else Partition([], [])
    if settings.forget_data:
        forget = [*forget, *read(settings.forget_data)]
    if not forget and not settings.forget_prompts:
        raise UserError(
            "Nothing to forget: choose among --data with --forget-class, --forget-phrase or --forget-files, or give "
            "--forget-data or --forget-prompts."
        )
    if not retain and not settings.retain_prompts:
        raise UserError("Nothing is left to retain: give --data with other images, or --retain-prompts.")
    return Partition(forget, retain)


def _chosen(settings: ImagesConfig, images: list[CaptionedImage]) -> Partition:
    """``images`` by what any of the ways to choose asks to be forgotten."""
    asked = []
    if settings.forget_classes:
        asked.append(forget_classes(images, settings.forget_classes, settings.class_column))
    if settings.forget_phrases:
        asked.append(forget_phrases(images, settings.forget_phrases))
    if settings.forget_files:
        asked.append(forget_files(images, settings.forget_files))
    forgotten = {image.id for partition in asked for image in partition.forget}
    return Partition([i for i in images if i.id in forgotten], [i for i in images if i.id not in forgotten])


def _made(config: Config, model: TextToImageModel, console: Console, prompts: tuple[str, ...]) -> list[CaptionedImage]:
    if not prompts:
        return []
    return synthesise(
        model,
        prompts,
        cache_folder(),
        console,
        count=config.images.images_per_prompt,
        guidance_scale=config.sample.guidance_scale,
        num_inference_steps=config.sample.num_inference_steps,
        height=config.images.height,
        width=config.images.width,
        seed=config.seed,
        batch_size=config.sample.batch_size,
    )

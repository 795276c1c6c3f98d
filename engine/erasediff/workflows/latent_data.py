"""The batches of a text-to-image run, from the cache of latents; or, to rehearse it, from noise."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from torch import Tensor

from erasediff.config import Config, ImagesConfig
from erasediff.data import (
    Buckets,
    CachedBatches,
    CachedImages,
    CaptionedImage,
    LatentCache,
    Partition,
    Stream,
    check_disjoint,
    forget_classes,
    forget_files,
    forget_phrases,
    read_images,
    synthesise,
)
from erasediff.data.latent_cache import BrokenImagePolicy, content_ids, survey
from erasediff.data.preprocessing import DEFAULT_STEP
from erasediff.errors import UserError
from erasediff.io.cache_dir import cache_folder
from erasediff.models.base import LatentModel
from erasediff.parallel.control_plane import ControlPlane
from erasediff.parallel.init import share_of
from erasediff.training.loop import Batches


def image_sets(config: Config, model: LatentModel, console: Console) -> Partition:
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


def _made(config: Config, model: LatentModel, console: Console, prompts: tuple[str, ...]) -> list[CaptionedImage]:
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


def latent_batches(config: Config, model: LatentModel, console: Console) -> tuple[Batches, Batches]:
    """(retain, forget), this rank's part, after the main one has computed whatever the cache lacks of them.

    UserError for the images' mistakes, a size that the model does not have, and sets that share an image.
    """
    hyper = config.unlearn
    batches = partial(
        CachedBatches,
        batch_size=hyper.batch_size,
        seed=config.seed,
        device=model.device,
        **share_of(hyper.batch_size, "unlearn.batch_size"),
    )
    with ControlPlane.current().main_process_first():
        retain, forget = _encoded(config, model, console)
    return (
        batches(retain, stream=Stream.RETAIN, caption_dropout=hyper.retain_label_dropout),
        batches(forget, stream=Stream.FORGET, caption_dropout=hyper.forget_label_dropout),
    )


def _encoded(config: Config, model: LatentModel, console: Console) -> tuple[CachedImages, CachedImages]:
    """(retain, forget) in the cache."""
    settings = config.images
    buckets = buckets_of(config, model)
    broken = BrokenImagePolicy(console, skip=settings.skip_broken)
    forget, retain = (survey(images, buckets, broken, console) for images in image_sets(config, model, console))
    check_disjoint(content_ids(forget), content_ids(retain))
    encode = partial(
        LatentCache(cache_folder()).encode,
        model=model,
        broken=broken,
        console=console,
        mirror=settings.mirror,
        batch_size=settings.encode_batch_size,
    )
    return encode(retain), encode(forget)


def image_size(config: Config, model: LatentModel) -> tuple[int, int]:
    """(height, width) in pixels: the configuration's, and where it has none, the checkpoint's."""
    height, width = model.default_size
    return config.images.height or height, config.images.width or width


def buckets_of(config: Config, model: LatentModel) -> Buckets:
    """The sizes that images are brought to. UserError for one that the model does not have, and a step too large."""
    height, width = image_size(config, model)
    step = config.images.bucket_step
    if step == "auto":
        step = DEFAULT_STEP if min(height, width) >= DEFAULT_STEP else None
    buckets = Buckets.only(height, width) if step is None else Buckets.around(height, width, step)
    for size in buckets.sizes:
        model.latent_shape(*size)
    return buckets


@dataclass(frozen=True, slots=True)
class NoiseBatches:
    """The same batch at every step."""

    batch: Mapping[str, Tensor]

    def at(self, step: int) -> Mapping[str, Tensor]:
        return self.batch


def rehearsal_batches(config: Config, model: LatentModel) -> tuple[Batches, Batches]:
    """Batches that cost what (retain, forget) would, without an image read or anything written. UserError as above.

    Encoding takes its share of the peak memory, so it is rehearsed too.
    """
    listed_images(config.images)
    buckets_of(config, model)
    size, at_once = image_size(config, model), config.images.encode_batch_size
    generator = torch.Generator().manual_seed(config.seed)
    latents = model.encode_images(torch.rand(at_once, 3, *size, generator=generator) * 2 - 1)
    condition = model.encode_prompts([""] * at_once) | model.size_condition(size, (0, 0), size, at_once)
    share = config.unlearn.batch_size // share_of(config.unlearn.batch_size, "unlearn.batch_size")["world_size"]
    rows = torch.arange(share, device=model.device) % at_once
    batches = NoiseBatches({name: tensor[rows] for name, tensor in {"sample": latents, **condition}.items()})
    return batches, batches

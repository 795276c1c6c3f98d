"""Batches of a text-to-image run: image sets, their latents in the cache, or noise for a rehearsal."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from erasediff.config import Config, ImagesConfig
from erasediff.data import (
    Buckets,
    CachedBatches,
    CachedImages,
    CaptionedImage,
    ImageSet,
    LatentCache,
    Partition,
    ReadOptions,
    Stream,
    check_disjoint,
    check_disjoint_paths,
    class_numbers,
    partition,
    read_image_set,
    select_classes,
    select_files,
    select_phrases,
    synthesise,
)
from erasediff.data.encoder_outputs import check_latents, encode_prompts
from erasediff.data.image_lists import ImageLists
from erasediff.data.image_lists import listed_images as listed
from erasediff.data.preprocessing import DEFAULT_STEP
from erasediff.data.prompt_images import Sampler
from erasediff.data.survey import BrokenImagePolicy, ImageRecord, content_ids, survey
from erasediff.errors import UserError
from erasediff.io.cache_dir import cache_folder
from erasediff.models.base import LatentModel
from erasediff.parallel.control_plane import ControlPlane
from erasediff.parallel.init import share_of
from erasediff.training.loop import Batches
from erasediff.utils.collector import paused_collector
from erasediff.workflows.earlier_requests import as_share, rehearsed_captions, without_earlier
from erasediff.workflows.seen_images import batches_seen, seen_numbers, unseen_warning


def image_sets(config: Config, sampler: Sampler, console: Console) -> Partition:
    """Forget and retain images. Those of prompts are sampled now, unless the cache has them.

    Raises:
        UserError: As ``listed_images``.
    """
    settings = config.images
    forget, retain = listed_images(settings)
    make = partial(_synthesised, config, sampler, console)
    drawn = [replace(image, selected_by=(("prompt", image.caption),)) for image in make(settings.forget_prompts)]
    # A lazy list of retained images stays one, unless others are drawn.
    retained = [*retain, *make(settings.retain_prompts)] if settings.retain_prompts else retain
    if settings.after is not None and settings.rehearsal_share > 0:
        rehearsed = make(rehearsed_captions(settings))
        retained = [*retained, *as_share(rehearsed, settings.rehearsal_share, len(retained))]
    return Partition([*forget, *drawn], retained)


@paused_collector()
def read_data(settings: ImagesConfig, location: str, *, captions: bool) -> ImageSet:
    """List the images of a data set of any format. UserError as in ``read_image_set``."""
    options = ReadOptions(
        split=settings.split,
        caption_column=settings.caption_column,
        template=settings.caption_template,
        class_column=settings.class_column,
        captions=captions,
    )
    return read_image_set(location, options)


@paused_collector()
def listed_images(settings: ImagesConfig, data: ImageSet | None = None, *, captions: bool = True) -> Partition:
    """List the images that exist before any are sampled for prompts. None is opened.

    Args:
        settings: The section ``images``.
        data: The images of ``settings.data``, if they are listed already.
        captions: Whether each image needs a caption.

    Raises:
        UserError: For images that cannot be listed or lack captions, a choice that fits none, and, prompts counted, a
            set that comes out empty.
    """
    if data is None and settings.data:
        data = read_data(settings, settings.data, captions=captions)
    forget, retain = _selected(settings, data) if data else Partition([], [])
    if data and settings.after is not None:
        retain = without_earlier(retain, data, settings)
    if settings.forget_data:
        request = (("folder", settings.forget_data),)
        others = read_data(settings, settings.forget_data, captions=captions).images
        forget = [*forget, *(replace(image, selected_by=request) for image in others)]
        check_disjoint_paths(forget, retain)
    if not forget and not settings.forget_prompts:
        raise UserError(
            "Nothing to forget: choose among --data with --forget-class, --forget-phrase or --forget-files, or give "
            "--forget-data or --forget-prompts."
        )
    if not retain and not settings.retain_prompts:
        raise UserError("Nothing is left to retain: give --data with other images, or --retain-prompts.")
    return Partition(forget, retain)


def _selected(settings: ImagesConfig, data: ImageSet) -> Partition:
    """Images of ``data`` to forget, selected by class, phrase or file, and all others."""
    images, selections = data.images, []
    if settings.forget_classes:
        requested: Sequence[str] = settings.forget_classes
        if data.class_names:
            requested = [data.class_names[number] for number in class_numbers(requested, data.class_names)]
        selections.append(select_classes(images, requested, settings.class_column))
    if settings.forget_phrases:
        selections.append(select_phrases(images, settings.forget_phrases))
    if settings.forget_files:
        selections.append(select_files(images, settings.forget_files))
    return partition(images, *selections)


def _synthesised(config: Config, sampler: Sampler, console: Console, prompts: tuple[str, ...]) -> list[CaptionedImage]:
    if not prompts:
        return []
    return synthesise(
        sampler,
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


@dataclass(frozen=True, slots=True)
class _LoadingSampler:
    """Sampler of a model whose denoiser is empty until images have to be drawn."""

    model: LatentModel
    load_denoiser: Callable[[], None]
    has_lora: bool

    @property
    def hash(self) -> str:
        return self.model.hash

    def denoiser_hash(self) -> str:
        if self.has_lora:
            # That of the merged weights, which are not on the disk.
            self._load()
        return self.model.denoiser_hash()

    def sample(self, prompts: Sequence[str], **options: Any) -> Tensor:
        self._load()
        return self.model.sample(prompts, **options)

    def _load(self) -> None:
        if self.model.denoiser_is_meta:
            self.load_denoiser()


@contextmanager
def prompt_sampler(config: Config, model: LatentModel, load_denoiser: Callable[[], None]) -> Iterator[Sampler]:
    """Sampler of ``model``, whose denoiser is empty; it is loaded within the block if images have to be sampled.

    Sampling takes denoiser, text encoders and VAE together, as sampling always does, but no gradients. After
    the block the denoiser is empty again.

    Args:
        config: Configuration, for its LoRA.
        model: Model opened with ``empty``.
        load_denoiser: Loads the denoiser of ``model``.
    """
    empty_denoiser = model.denoiser
    try:
        yield _LoadingSampler(model, load_denoiser, config.text_to_image.lora is not None)
    finally:
        has_drawn = model.denoiser is not empty_denoiser
        model.denoiser = empty_denoiser
        if has_drawn:
            # Pipelines may refer to themselves: their networks would stay in memory until Python happens to collect.
            gc.collect()


class LatentBatches(NamedTuple):
    """Batches of this rank, and lists of their images."""

    retain: Batches
    forget: Batches
    lists: ImageLists


def latent_batches(
    config: Config, model: LatentModel, console: Console, load_denoiser: Callable[[], None]
) -> LatentBatches:
    """Batches of this rank, after the main rank has computed what the cache lacks.

    Args:
        config: The sections ``images`` and ``unlearn``.
        model: Model opened with ``empty``; its denoiser is empty again afterwards.
        console: Console for progress bars.
        load_denoiser: See ``prompt_sampler``.

    Raises:
        UserError: For the images' mistakes, a size that the model does not have, and sets that share an image.
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
        retain, forget, lists = _encoded(config, model, console, load_denoiser)
    forgotten = batches(forget, stream=Stream.FORGET, caption_dropout=hyper.forget_label_dropout)
    return LatentBatches(
        batches(retain, stream=Stream.RETAIN, caption_dropout=hyper.retain_label_dropout),
        forgotten,
        replace(lists, warning=unseen_warning(config, forgotten.order, forget, len(lists.forget))),
    )


def _encoded(
    config: Config, model: LatentModel, console: Console, load_denoiser: Callable[[], None]
) -> tuple[CachedImages, CachedImages, ImageLists]:
    """(retain, forget) in the cache, those that the run will see, and lists of all images."""
    settings = config.images
    buckets = buckets_of(config, model)
    broken = BrokenImagePolicy(console, skip=settings.skip_broken)
    with prompt_sampler(config, model, load_denoiser) as sampler:
        sets = image_sets(config, sampler, console)
    samples = batches_seen(config) * config.unlearn.batch_size
    chosen = [
        seen_numbers(config, len(images), samples, stream)
        for images, stream in zip(sets, (Stream.FORGET, Stream.RETAIN), strict=True)
    ]
    forget, retain = (
        survey(images, buckets, broken, console, numbers) for images, numbers in zip(sets, chosen, strict=True)
    )
    check_disjoint(content_ids(forget), content_ids(retain), _paths(forget), _paths(retain))
    encode = partial(
        LatentCache(cache_folder()).encode,
        model=model,
        broken=broken,
        console=console,
        mirror=settings.mirror,
        batch_size=settings.encode_batch_size,
    )
    retained, forgotten = encode(retain, chosen=chosen[1]), encode(forget, chosen=chosen[0])
    lists = ImageLists(listed(sets.forget, forgotten, "caption"), listed(sets.retain, retained, "caption"))
    return retained, forgotten, lists


def _paths(records: Sequence[ImageRecord]) -> list[str]:
    return [str(record.image.path) for record in records]


def image_size(config: Config, model: LatentModel) -> tuple[int, int]:
    """Image size (height, width) in pixels of the configuration or, by default, of the checkpoint."""
    height, width = model.default_size
    return config.images.height or height, config.images.width or width


def buckets_of(config: Config, model: LatentModel) -> Buckets:
    """Sizes that images are resized and cropped to.

    Raises:
        UserError: For a size that the model does not have, and a step between sizes that is too large.
    """
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
    """Batches of noise, the same at every step."""

    batch: Mapping[str, Tensor]

    def at(self, step: int) -> Mapping[str, Tensor]:
        return self.batch


def rehearsal_batches(config: Config, model: LatentModel) -> tuple[Batches, Batches]:
    """Batches (retain, forget) of realistic cost for a dry run, without reading images or writing files.

    Encoding takes its share of the peak memory, so it is rehearsed too.

    Raises:
        UserError: As ``latent_batches``, for what can be told without opening an image.
    """
    listed_images(config.images)
    buckets_of(config, model)
    size, count = image_size(config, model), config.images.encode_batch_size
    generator = torch.Generator().manual_seed(config.seed)
    latents = model.encode_images(torch.rand(count, 3, *size, generator=generator) * 2 - 1)
    check_latents({"latents": latents}, ["of random pixels"] * count)
    condition = encode_prompts(model, [""] * count) | model.size_condition(size, (0, 0), size, count)
    share = config.unlearn.batch_size // share_of(config.unlearn.batch_size, "unlearn.batch_size")["world_size"]
    rows = torch.arange(share, device=model.device) % count
    batches = NoiseBatches({name: tensor[rows] for name, tensor in {"sample": latents, **condition}.items()})
    return batches, batches

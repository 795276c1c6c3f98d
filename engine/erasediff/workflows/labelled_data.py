"""Data of models without prompts: images to forget, to retain and to train on, in memory or in the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from erasediff.config import Config, ImagesConfig
from erasediff.data import (
    Buckets,
    CachedBatches,
    CachedImages,
    CaptionedImage,
    ClassDataset,
    GlobalBatches,
    Images,
    ImageSet,
    LatentCache,
    Stream,
    check_disjoint,
    class_numbers,
    forget_retain_split,
    load_digits,
)
from erasediff.data.labelled_images import by_label, labels_in, of_labels
from erasediff.data.preprocessing import open_picture
from erasediff.data.survey import BrokenImagePolicy, survey
from erasediff.diffusion.batch import Batch
from erasediff.errors import UserError
from erasediff.io.cache_dir import cache_folder
from erasediff.models.diffusion_model import SampleEncoder, UnpromptedModel
from erasediff.parallel.control_plane import ControlPlane
from erasediff.parallel.init import share_of
from erasediff.training.loop import Batches
from erasediff.workflows.earlier_requests import earlier_requests
from erasediff.workflows.latent_data import NoiseBatches, listed_images, read_data
from erasediff.workflows.load_model import check_fits
from erasediff.workflows.seen_images import seen_numbers

DIGITS = "digits"
ModelT = TypeVar("ModelT", bound=UnpromptedModel)
Samples = Images | Sequence[CaptionedImage]
"""Samples as tensors in memory, or as image files that are read when they are needed."""


@dataclass(frozen=True, slots=True)
class LabelledSplit:
    """Samples to forget and to retain; ``forgotten`` are the classes that were asked for by number or name."""

    forget: Samples
    retain: Samples
    forgotten: tuple[int, ...]


class LabelledData(Protocol):
    """Data set of images with a class or without."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def split(self, config: Config) -> LabelledSplit:
        """Split by ``config``. UserError for classes or files that do not exist, and a set that comes out empty."""

    def training(self, exclude: Sequence[int | str]) -> Samples:
        """Samples of the training part without some classes. UserError as in ``split``."""

    def image_shape(self, config: Config) -> tuple[int, int, int]:
        """(channels, height, width) of a model that is to be trained on it. UserError where they do not say."""

    def fit(self, model: ModelT, source: object) -> ModelT:
        """The model, with the classes of this data. UserError for one that cannot have been trained on it."""


def open_data(config: Config, given: ImageSet | None = None) -> LabelledData:
    """The data set ``given``, or that which ``config.images.data`` names, by default the digits.

    Raises:
        UserError: As the format's ``read``.
    """
    if given is not None:
        return ImageData(given)
    location = config.images.data
    if location is None and config.images.forget_data is not None:
        raise UserError("Nothing is left to retain: give --data with other images beside --forget-data.")
    if location in (None, DIGITS):
        return TensorData(load_digits())
    return ImageData(read_data(config.images, location, captions=False))


def for_data(config: Config, given: ImageSet | None = None) -> Config:
    """Fill in the CPU threads of data other than the digits, whose one thread is too few: one per core."""
    if "threads" in config.model_fields_set or (given is None and config.images.data in (None, DIGITS)):
        return config
    return config.model_copy(update={"threads": None})


@dataclass(frozen=True, slots=True)
class TensorData:
    """Data set in memory, whose images are of one size."""

    dataset: ClassDataset

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.dataset.class_names

    def split(self, config: Config) -> LabelledSplit:
        settings = config.images
        if settings.forget_files or settings.forget_phrases or settings.forget_data:
            raise UserError("The digits have neither files nor captions: choose what to forget with --forget-class.")
        forgotten = class_numbers((*config.unlearn.forget, *settings.forget_classes), self.class_names)
        retained = config.unlearn.retain
        kept = None if retained is None else class_numbers(retained, self.class_names)
        earlier = class_numbers(
            [name for request in earlier_requests(settings.after) for name in request.class_names(self.class_names)],
            self.class_names,
        )
        if earlier:
            every = range(len(self.class_names)) if kept is None else kept
            kept = tuple(number for number in every if number not in (*earlier, *forgotten))
        forget, retain = forget_retain_split(self.dataset.train, forgotten, kept)
        return LabelledSplit(forget, retain, forgotten)

    def training(self, exclude: Sequence[int | str]) -> Images:
        images = self.dataset.train
        if exclude:
            _, images = forget_retain_split(images, class_numbers(exclude, self.class_names))
        return images

    def image_shape(self, config: Config) -> tuple[int, int, int]:
        channels, height, width = self.dataset.train.sample.shape[1:]
        return channels, height, width

    def fit(self, model: ModelT, source: object) -> ModelT:
        check_fits(model, self.dataset, source)
        return model


ENCODED_AT_ONCE = 64
SAMPLED = 32
"""Images that are opened to find out the size and channels of a data set."""


@dataclass(frozen=True, slots=True)
class ImageData:
    """Data set of image files or arrays, which are resized and cropped to the model's size."""

    images: ImageSet

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.images.class_names

    def split(self, config: Config) -> LabelledSplit:
        names, column = self.class_names, config.images.class_column
        forgotten = class_numbers((*config.unlearn.forget, *config.images.forget_classes), names)
        chosen = config.images.model_copy(update={"forget_classes": tuple(names[number] for number in forgotten)})
        forget, retain = listed_images(chosen, self.images, captions=False)
        if config.images.forget_data:
            numbers = {name: number for number, name in enumerate(names)}
            forget = [replace(image, label=numbers.get(image.attributes.get(column, ""))) for image in forget]
        if config.unlearn.retain is not None:
            kept = class_numbers(config.unlearn.retain, names)
            if set(kept) & set(forgotten):
                raise UserError("A class cannot be forgotten and retained: take it out of one of the two.")
            retain = of_labels(retain, kept)
        if not retain:
            raise UserError("Nothing is left to retain: forget fewer classes.")
        return LabelledSplit(forget, retain, forgotten)

    def training(self, exclude: Sequence[int | str]) -> Sequence[CaptionedImage]:
        left_out = class_numbers(exclude, self.class_names)
        images = self.images.images
        if left_out:
            images = of_labels(images, labels_in(images) - set(left_out))
        if not images:
            raise UserError("Nothing is left to retain: forget fewer classes.")
        return images

    def image_shape(self, config: Config) -> tuple[int, int, int]:
        images = self.images.images
        count = min(SAMPLED, len(images))
        pictures = [open_picture(image.read(), str(image.path)) for image in images[:: len(images) // count][:count]]
        is_grey = all(
            band.tobytes() == first.tobytes()
            for first, *bands in (picture.split() for picture in pictures)
            for band in bands
        )
        sizes = {(picture.height, picture.width) for picture in pictures}
        height, width = config.images.height, config.images.width
        if height is None or width is None:
            if len(sizes) > 1:
                raise UserError("The images are of several sizes: set images.height and images.width for the model.")
            height, width = (given or own for given, own in zip((height, width), *sizes, strict=True))
        return 1 if is_grey else 3, height, width

    def fit(self, model: ModelT, source: object) -> ModelT:
        return model.described_by(self.class_names)


def labels_of(samples: Samples) -> list[int]:
    """Classes that occur among ``samples``, sorted."""
    if isinstance(samples, Images):
        return sorted(set(samples.class_labels.tolist()))
    return sorted(label for label in labels_in(samples) if label is not None)


def labelled_batches(
    config: Config,
    model: UnpromptedModel,
    console: Console,
    samples: Mapping[Stream, Samples],
    *,
    batch_size: int,
    setting: str,
    seen: int,
    dropout: Mapping[Stream, float],
    rehearse: bool = False,
) -> dict[Stream, Batches]:
    """Batches of this rank for each stream, after the main rank has put into the cache what it lacks.

    Args:
        config: The section ``images`` and the seed.
        model: What the batches are for.
        console: Console for progress bars.
        samples: Samples of each stream.
        batch_size: Of all ranks together.
        setting: The setting that ``batch_size`` is from.
        seen: Number of batches of each stream that the run looks at.
        dropout: Share of each stream's labels that become the null label.
        rehearse: Take noise in the place of images that would have to be read.

    Raises:
        UserError: An image is broken or has no class, or two streams share an image.
    """
    share = share_of(batch_size, setting)
    if model.null_label is None:
        dropout = dict.fromkeys(samples, 0.0)
    in_memory = {stream: images for stream, images in samples.items() if isinstance(images, Images)}
    if in_memory:
        return {
            stream: GlobalBatches(
                images.to(model.device),
                batch_size,
                seed=config.seed,
                stream=stream,
                conditional=model.condition == "class",
                label_dropout=dropout[stream],
                null_label=model.null_label,
                **share,
            )
            for stream, images in in_memory.items()
        }
    if rehearse:
        return {
            stream: NoiseBatches(_noise(config, model, batch_size, setting, labels_of(images)))
            for stream, images in samples.items()
        }
    files = {stream: images for stream, images in samples.items() if not isinstance(images, Images)}
    if model.condition == "class":
        _check_labels(files, model)
    broken = BrokenImagePolicy(console, skip=config.images.skip_broken)
    with ControlPlane.current().main_process_first():
        cached = {}
        for stream, images in files.items():
            chosen = seen_numbers(config, len(images), seen * batch_size, stream)
            cached[stream] = encoded(config, model, images, broken, console, chosen)
        if Stream.FORGET in cached:
            forget, retain = cached[Stream.FORGET], cached[Stream.RETAIN]
            names = ([entry.path for entry in images.entries] for images in (forget, retain))
            check_disjoint(forget.ids, retain.ids, *names)
    return {
        stream: CachedBatches(
            images,
            batch_size,
            seed=config.seed,
            stream=stream,
            caption_dropout=dropout[stream],
            device=model.device,
            **share,
        )
        for stream, images in cached.items()
    }


CLASSIFIED = 5_000
"""Images that a classifier is fitted to and tested on; its cost grows with their square."""
TEST_EVERY = 5


def class_dataset(config: Config, data: LabelledData, model: SampleEncoder, console: Console) -> ClassDataset:
    """Images of ``data`` in memory in the model's size, to fit a classifier to: a fifth of each class held out.

    Of more than ``CLASSIFIED`` images, evenly spaced ones of each class.
    """
    if isinstance(data, TensorData):
        return data.dataset
    samples = data.training(())
    assert not isinstance(samples, Images)
    parts: dict[str, list[CaptionedImage]] = {"train": [], "test": []}
    for members in by_label(samples).values():
        count = min(len(members), max(CLASSIFIED // len(data.class_names), TEST_EVERY))
        chosen = [members[place * len(members) // count] for place in range(count)]
        parts["test"] += chosen[::TEST_EVERY] if count > 1 else []
        parts["train"] += [image for place, image in enumerate(chosen) if place % TEST_EVERY or count == 1]
    broken = BrokenImagePolicy(console, skip=config.images.skip_broken)
    train, test = (_in_memory(encoded(config, model, images, broken, console)) for images in parts.values())
    return ClassDataset(train, test, data.class_names)


def _in_memory(cached: CachedImages) -> Images:
    pixels = torch.stack([cached.row(entry)["sample"] for entry in cached.entries]).float() / 127.5 - 1
    labels = torch.tensor([entry.label for entry in cached.entries])
    return Images(pixels, labels, torch.arange(len(labels)))


def _noise(config: Config, model: UnpromptedModel, batch_size: int, setting: str, labels: Sequence[int]) -> Batch:
    """This rank's part of a batch of noise in the place of images, all of the first of ``labels``."""
    size = batch_size // share_of(batch_size, setting)["world_size"]
    generator = torch.Generator().manual_seed(config.seed)
    batch = {"sample": (torch.rand(size, *model.sample_shape, generator=generator) * 2 - 1).to(model.device)}
    if model.condition == "class":
        batch["class_labels"] = torch.full((size,), next(iter(labels), 0), device=model.device)
    return batch


def encoded(
    config: Config,
    model: SampleEncoder,
    images: Sequence[CaptionedImage],
    broken: BrokenImagePolicy,
    console: Console,
    chosen: Tensor | None = None,
) -> CachedImages:
    """``images`` in the cache as the model's samples, those that it lacks encoded now.

    Args:
        config: The section ``images``.
        model: What the samples are for.
        images: The data set.
        broken: What becomes of a broken image.
        console: Console for progress bars.
        chosen: int64 [n], the places of the images that are needed; None for all.

    Raises:
        UserError: As ``survey``.
    """
    _, height, width = model.image_shape
    # An autoencoder takes gigabytes for each image; pixels are only copied.
    at_least = 1 if model.space == "latent" else ENCODED_AT_ONCE
    return LatentCache(cache_folder()).encode_unprompted(
        survey(images, Buckets.only(height, width), broken, console, chosen),
        model,
        broken,
        console,
        labelled=model.condition == "class",
        null_label=model.null_label,
        mirror=config.images.mirror,
        batch_size=max(config.images.encode_batch_size, at_least),
        chosen=chosen,
    )


def _check_labels(samples: Mapping[Stream, Sequence[CaptionedImage]], model: UnpromptedModel) -> None:
    for images in samples.values():
        if None in labels_in(images):
            missing = of_labels(images, [None])[0]
            raise UserError(
                f"{missing.path} has no class of the data, and the model is class-conditional: put it into a folder "
                "called like its class, or name the column with --set images.class_column."
            )


def refuse_prompt_settings(settings: ImagesConfig) -> None:
    """Raise UserError for images that a model without prompts cannot draw."""
    for name in ("forget_prompts", "retain_prompts"):
        if getattr(settings, name):
            raise UserError(
                f"The setting images.{name} is for text-to-image models: a model without prompts forgets images of "
                "--data, by class or file."
            )

"""Train a pixel-space model from scratch: a base model, or one that never saw the excluded classes."""

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from erasediff.config import Config, ImagesConfig
from erasediff.data import ImageSet, Stream, load_digits
from erasediff.errors import UserError
from erasediff.io.atomic import storage_errors
from erasediff.io.cache_dir import cache_folder
from erasediff.methods import FineTune
from erasediff.models import PixelModel
from erasediff.models.weight_update import host_copy
from erasediff.training.job import RunResult, TrainingJob, parallelize, precision_of, set_up_device, thread_scope
from erasediff.training.loop import Batches
from erasediff.training.lr_schedule import LearningRate
from erasediff.training.run_dir import RunFolder, RunPlace
from erasediff.training.run_size import run_bytes
from erasediff.utils.versions import library_versions
from erasediff.workflows.build_method import save_measured
from erasediff.workflows.labelled_data import (
    LabelledData,
    Samples,
    for_data,
    labelled_batches,
    open_data,
    refuse_prompt_settings,
)
from erasediff.workflows.load_model import check_pixel_precision
from erasediff_kernels import ConstrainedAdamW


def train_base(config: Config, place: RunPlace, console: Console, title: str = "Training") -> RunResult:
    """Train the model that ``config`` describes on its data, in a run folder."""
    return training_job(config, title, console).run(place, console)


def untrained_model(config: Config, device: torch.device) -> PixelModel:
    """Build the model that ``config`` describes, with its initial weights. UserError as ``open_data``."""
    return _untrained(config, open_data(config), device)


def _untrained(config: Config, data: LabelledData, device: torch.device) -> PixelModel:
    settings = config.model.model_dump(exclude={"conditional"})
    classes = len(data.class_names) if config.model.conditional else None
    if classes == 0:
        raise UserError("The images have no classes to condition on: put each class into a folder, or --unconditional.")
    model = PixelModel.build(num_classes=classes, image_shape=data.image_shape(config), seed=config.seed, **settings)
    return model.described_by(data.class_names).to(device)


@thread_scope()
def training_job(
    config: Config,
    title: str = "Training",
    console: Console | None = None,
    *,
    data: ImageSet | None = None,
    rehearse: bool = False,
) -> TrainingJob:
    """Build the job of ``train_base``.

    Args:
        config: Complete configuration.
        title: Title of the progress bar.
        console: Console for progress bars; None for silence.
        data: Takes the place of the configuration's, such as one of ``from_torch_dataset``.
        rehearse: Build a run to be measured instead, on noise where images would have to be read.

    Raises:
        UserError: For excluded classes that do not exist, and as ``open_data`` and ``labelled_batches``.
    """
    check_pixel_precision(config)
    refuse_prompt_settings(config.images)
    config, settings = for_data(config, data), config.train
    device = set_up_device(config)
    labelled = open_data(config, data)
    images = labelled.training(config.data.exclude)
    model = _untrained(config, labelled, device)
    retain = _batches(config, model, images, console or Console(quiet=True), rehearse=rehearse)
    original = host_copy(model.denoiser)
    disk_bytes = run_bytes(config, settings, model.denoiser, model.denoiser.parameters())
    trained, optimizer = parallelize(
        config,
        settings,
        model.denoiser,
        model.denoiser.parameters(),
        partial(ConstrainedAdamW, lr=settings.lr, weight_decay=settings.weight_decay, ema_decay=settings.ema_decay),
    )
    return TrainingJob(
        title=title,
        config=config,
        network=model.denoiser,
        save=partial(save_measured, model.denoiser, original, partial(model.save, replace=True)),
        disk_bytes=disk_bytes,
        optimizer=optimizer,
        method=FineTune(
            trained,
            optimizer,
            process=model.process,
            min_snr_gamma=settings.min_snr_gamma,
            max_grad_norm=settings.max_grad_norm,
            accumulation_steps=settings.accumulation_steps,
            autocast=precision_of(config),
            seed=config.seed,
        ),
        rate=LearningRate(settings.lr, settings.steps, settings.warmup_steps, settings.lr_schedule),
        retain=retain,
    )


def _batches(config: Config, model: PixelModel, images: Samples, console: Console, *, rehearse: bool) -> Batches:
    settings = config.train
    batches = labelled_batches(
        config,
        model,
        console,
        {Stream.RETAIN: images},
        batch_size=settings.batch_size,
        setting="train.batch_size",
        seen=settings.steps,
        dropout={Stream.RETAIN: settings.label_dropout},
        rehearse=rehearse,
    )
    return batches[Stream.RETAIN]


SETTINGS_AFTER_THE_FIRST_CACHES: Mapping[str, set[str] | bool] = {
    "unlearn": {"target_space", "level", "until", "max_steps", "max_minutes"},
    "images": {"cache", "after", "rehearsal_share"},
    "distributed": {"own_reduction"},
    "run": {"look_every", "drift_limit"},
    "verdict": True,
}
"""Settings that do not change what is trained and are younger than caches in use: no cache goes cold for them."""


class CachedTraining:
    """Cached training of the model of ``config`` without the classes ``exclude``."""

    @thread_scope()
    def __init__(self, config: Config, exclude: tuple[int, ...] = ()) -> None:
        self.config = Config(
            seed=config.seed,
            device=set_up_device(config).type,
            threads=config.threads,
            precision=config.precision,
            model=config.model,
            data=config.data.model_copy(update={"exclude": tuple(sorted(exclude))}),
            train=config.train,
            # The digits are in memory: this is what runs have that an earlier version began.
            images=ImagesConfig(cache="all"),
        )
        self.run = RunFolder(cache_folder() / f"model-{_fingerprint(self.config)}")

    def obtain(self, console: Console, title: str) -> RunFolder:
        """Return the finished run, training now unless it exists; an interrupted training continues."""
        with _lock(self.run.path, console):
            if not self.run.finished:
                train_base(self.config, RunPlace(self.run.path, resuming=self.run.begun), console, title)
        return self.run


def _fingerprint(config: Config) -> str:
    """Hash of the settings, the training images and the versions of the code that turns them into a model."""
    images = load_digits().train
    digest = hashlib.sha256(images.sample.numpy().tobytes() + images.class_labels.numpy().tobytes())
    digest.update(config.to_yaml(exclude=SETTINGS_AFTER_THE_FIRST_CACHES).encode())
    digest.update(json.dumps(library_versions()).encode())
    return digest.hexdigest()[:16]


@contextmanager
def _lock(run: Path, console: Console) -> Iterator[None]:
    """Keep other processes from training the same model at the same time."""
    with storage_errors(run):
        run.parent.mkdir(parents=True, exist_ok=True)
        file = run.with_suffix(".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print("Another process is training this model; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield

"""Unlearn classes of the digits from a model, with any of the methods."""

import copy
from functools import partial

import torch
from rich.console import Console

from erasediff.config import Config, UnlearnConfig
from erasediff.data import GlobalBatches, Images, Stream, forget_retain_split, load_digits
from erasediff.errors import UserError
from erasediff.models import PixelModel
from erasediff.objectives import DeviationTarget, GaussianNoise, Relabel, UniformNoise
from erasediff.process import Process
from erasediff.runs.folder import RunPlace
from erasediff.runs.schedule import LearningRate
from erasediff.stages.loading import load_model
from erasediff.stages.method import unlearning_method
from erasediff.stages.session import RunResult, Session, set_up_device
from erasediff_kernels import ConstrainedAdamW


def unlearn(config: Config, place: RunPlace, console: Console) -> RunResult:
    """Make the model at ``config.unlearn.model`` forget ``config.unlearn.forget``."""
    return unlearning_session(config).run(place, console)


def unlearning_session(config: Config, model: PixelModel | None = None) -> Session:
    """The run of ``unlearn``, built but not begun; ``model`` is used in the place of the configuration's.

    UserError without a model, for classes that do not exist, and for forget and retain sets that are empty or overlap.
    """
    settings = config.unlearn
    device = set_up_device(config)
    dataset = load_digits()
    forget, retain = forget_retain_split(dataset.train, settings.forget, settings.retain)
    if model is None:
        if settings.model is None:
            raise UserError("Say with --model which model to unlearn from: a diffusers folder.")
        model = load_model(settings.model, dataset, device)
    optimizer = ConstrainedAdamW(
        model.unet.parameters(), settings.lr, weight_decay=settings.weight_decay, ema_decay=settings.ema_decay
    )

    batches = partial(
        GlobalBatches,
        batch_size=settings.batch_size,
        seed=config.seed,
        conditional=model.num_classes is not None,
        null_label=model.null_label,
    )

    return Session(
        title=f"Unlearning ({settings.method})",
        config=config,
        network=model.unet,
        save=partial(model.save, replace=True),
        optimizer=optimizer,
        method=unlearning_method(
            config,
            model.unet,
            optimizer,
            process=Process.from_scheduler(model.scheduler),
            target=partial(target_of, settings, retain, model),
        ),
        rate=LearningRate(settings.lr, settings.steps, settings.warmup_steps, settings.lr_schedule),
        retain=batches(retain.to(device), stream=Stream.RETAIN, label_dropout=settings.retain_label_dropout),
        forget=batches(forget.to(device), stream=Stream.FORGET, label_dropout=settings.forget_label_dropout),
    )


def target_of(settings: UnlearnConfig, retain: Images, model: PixelModel) -> DeviationTarget:
    """The deviated target by its name; relabelling draws from the retained classes."""
    match settings.target:
        case "uniform":
            return UniformNoise()
        case "gaussian":
            return GaussianNoise()
    if model.num_classes is None:
        raise UserError("The target relabel needs a class-conditional model; use uniform or gaussian.")
    teacher = copy.deepcopy(model.unet) if settings.teacher == "frozen" else None
    return Relabel({"class_labels": torch.tensor(sorted(set(retain.class_labels.tolist())))}, teacher)

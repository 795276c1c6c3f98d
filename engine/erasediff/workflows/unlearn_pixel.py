"""Unlearn classes of the digits from a model, with any of the methods."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from rich.console import Console
from torch import nn

from erasediff.config import Config, UnlearnConfig
from erasediff.data import GlobalBatches, Images, Stream, forget_retain_split, load_digits
from erasediff.data.image_lists import lists_of_tensors
from erasediff.diffusion.batch import diffusers_denoiser
from erasediff.diffusion.noise_schedule import Process
from erasediff.diffusion.targets import Relabel
from erasediff.errors import UserError
from erasediff.methods import METHOD_SPECS
from erasediff.models import PixelModel
from erasediff.parallel.init import share_of
from erasediff.training.job import RunResult, TrainingJob, set_up_device, thread_scope
from erasediff.training.run_dir import RunPlace
from erasediff.workflows.build_method import UnlearningModel, build_training_job, method_parameters, needed_batches
from erasediff.workflows.load_model import check_pixel_precision, load_model


def unlearn(config: Config, place: RunPlace, console: Console) -> RunResult:
    """Make the model at ``config.unlearn.model`` forget ``config.unlearn.forget``."""
    return pixel_unlearning_job(config).run(place, console)


@thread_scope()
def pixel_unlearning_job(config: Config, model: PixelModel | None = None) -> TrainingJob:
    """Build the job of ``unlearn``; ``model`` replaces the configuration's.

    Raises:
        UserError: There is no model, a class does not exist, or forget and retain sets are empty or overlap.
    """
    check_pixel_precision(config)
    device = set_up_device(config)
    dataset = load_digits()
    forget, retain = forget_retain_split(dataset.train, config.unlearn.forget, config.unlearn.retain)
    if model is None:
        if config.unlearn.model is None:
            raise UserError("There is no model to unlearn from; name a diffusers folder with --model.")
        model = load_model(config.unlearn.model, dataset, device)
    model = model.to(device)
    config = resolved(config, conditional=model.num_classes is not None, retain=retain)
    settings = config.unlearn
    if not needed_batches(config):
        raise UserError(
            f"The method {settings.method} needs prompts, which no model of the digits has; choose another --method."
        )
    batches = partial(
        GlobalBatches,
        batch_size=settings.batch_size,
        seed=config.seed,
        conditional=model.num_classes is not None,
        null_label=model.null_label,
        **share_of(settings.batch_size, "unlearn.batch_size"),
    )
    job = build_training_job(
        config,
        UnlearningModel(
            network=model.unet,
            process=Process.from_scheduler(model.scheduler),
            predict=diffusers_denoiser,
            save=partial(model.save, replace=True),
            relabel=partial(relabelling, settings, model),
        ),
        method_parameters(config, model.unet),
        retain=batches(retain.to(device), stream=Stream.RETAIN, label_dropout=settings.retain_label_dropout),
        forget=batches(forget.to(device), stream=Stream.FORGET, label_dropout=settings.forget_label_dropout),
    )
    return replace(job, lists=lists_of_tensors(forget, retain, "digits"))


def resolved(config: Config, *, conditional: bool, retain: Images) -> Config:
    """Fill in the defaults of the kind of model, wherever nothing was set."""
    retained = sorted(set(retain.class_labels.tolist()))
    defaults = METHOD_SPECS[config.unlearn.method].defaults(config, "pixel")
    settings = config.unlearn.resolved(conditional=conditional, retained=retained, method_defaults=defaults)
    unknown = set(settings.relabel_to or ()) - set(retained)
    if unknown:
        raise UserError(
            f"Cannot relabel the forgotten class to {', '.join(map(str, sorted(unknown)))}: choose a retained class."
        )
    return config.model_copy(update={"unlearn": settings})


def relabelling(settings: UnlearnConfig, model: PixelModel, teacher: Callable[[], nn.Module]) -> Relabel:
    """Relabelling target: another class. UserError for a model without classes."""
    if model.num_classes is None:
        raise UserError("The target relabel needs a class-conditional model; use uniform or gaussian.")
    choices = {"class_labels": torch.tensor(settings.relabel_to)}
    return Relabel(choices, teacher() if settings.teacher == "frozen" else None)

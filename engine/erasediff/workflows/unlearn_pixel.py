"""Unlearn classes or images from a model without prompts, class-conditional or not, with any of the methods."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import nn

from erasediff.config import Config, TextToImageConfig, UnlearnConfig
from erasediff.data import CachedBatches, CachedImages, Images, ImageSet, Stream, class_numbers
from erasediff.data.batches import SampleBatches
from erasediff.data.image_lists import ImageLists, ListedImage, listed_images, lists_of_tensors
from erasediff.diffusion.targets import Relabel
from erasediff.errors import UserError
from erasediff.methods import METHOD_SPECS
from erasediff.models.diffusion_model import UnpromptedModel
from erasediff.models.pixel_unet import PixelModel
from erasediff.models.trainable import has_attention, select
from erasediff.models.unprompted_latents import UnpromptedLatentModel
from erasediff.training.job import RunResult, TrainingJob, loads_sharded, set_up_device, thread_scope
from erasediff.training.loop import Batches
from erasediff.training.run_dir import RunPlace
from erasediff.workflows.build_method import (
    UnlearningModel,
    build_training_job,
    check_output,
    differs_by_training,
    method_parameters,
    needed_batches,
    output_name,
    save_unlearned,
    saved_bytes,
    selected_weights,
)
from erasediff.workflows.labelled_data import (
    DIGITS,
    LabelledSplit,
    Samples,
    for_data,
    labelled_batches,
    labels_of,
    open_data,
    refuse_prompt_settings,
)
from erasediff.workflows.load_model import check_pixel_precision, load_unprompted, read_denoiser
from erasediff.workflows.seen_images import batches_seen, unseen_warning

ATTENTION = "selfattn"
"""What a LoRA adapts by default where there is no cross-attention."""


def unlearn(config: Config, place: RunPlace, console: Console) -> RunResult:
    """Make the model at ``config.unlearn.model`` forget ``config.unlearn.forget``."""
    return pixel_unlearning_job(config, console=console).run(place, console)


@thread_scope()
def pixel_unlearning_job(
    config: Config,
    model: PixelModel | UnpromptedLatentModel | None = None,
    console: Console | None = None,
    *,
    data: ImageSet | None = None,
    rehearse: bool = False,
) -> TrainingJob:
    """Build the job of ``unlearn``.

    Args:
        config: Settings that are not set take the defaults of the kind of model.
        model: Takes the place of the configuration's.
        console: Console for progress bars and notes; None for silence.
        data: Takes the place of the configuration's, such as one of ``from_torch_dataset``.
        rehearse: Build a run to be measured instead, which reads no images and writes nothing.

    Raises:
        UserError: There is no model, a class or file does not exist, forget and retain sets are empty or overlap, or
            model and data do not fit.
    """
    console = console or Console(quiet=True)
    check_pixel_precision(config)
    refuse_prompt_settings(config.images)
    check_unprompted(config)
    config = for_data(config, data)
    device = set_up_device(config)
    labelled = open_data(config, data)
    split = labelled.split(config)
    source = config.unlearn.model
    # A model that was given may have been trained since it was read.
    is_measured = model is None and differs_by_training(config)
    if model is None:
        if source is None:
            raise UserError("There is no model to unlearn from; name a diffusers folder with --model.")
        model = load_unprompted(source, device, console, lora_file=config.text_to_image.lora, empty=True)
    model = labelled.fit(model, source).to(device)
    config = _by_number(for_unprompted(config), labelled.class_names, split)
    is_conditional = model.condition == "class"
    config = resolved(config, conditional=is_conditional, retain=split.retain, forget=split.forget)
    settings = config.unlearn
    check_output(config, model)
    if model.null_label is None and is_conditional:
        # There is no label to drop to.
        console.print("The model has no null label, so labels are not dropped.", highlight=False)
    selected = unprompted_weights(config, model.denoiser)
    retain, forget, lists = _batches(config, model, console, split, rehearse=rehearse)
    model.release_encoders()
    if model.denoiser_is_meta and not loads_sharded(config):
        read_denoiser(config, model)
    if config.text_to_image.gradient_checkpointing:
        network: Any = model.denoiser
        network.enable_gradient_checkpointing()
    job = build_training_job(
        config,
        UnlearningModel(
            network=model.denoiser,
            process=model.process,
            predict=model.predict,
            save=partial(save_unlearned, config, model),
            saved_bytes=saved_bytes(config, model),
            is_measured=is_measured,
            saved_as=output_name(config),
            weights=model.denoiser_weights if model.denoiser_is_meta else None,
            relabel=partial(relabelling, settings, model),
        ),
        method_parameters(config, model.denoiser, selected),
        retain=retain,
        forget=forget,
    )
    return replace(job, lists=lists)


def check_unprompted(config: Config) -> None:
    """Raise UserError for a method that works on prompts."""
    if METHOD_SPECS[config.unlearn.method].run is not None or not needed_batches(config):
        raise UserError(
            f"The method {config.unlearn.method} needs prompts, which no class-conditional or unconditional model has; "
            "choose another --method."
        )


def for_unprompted(config: Config) -> Config:
    """Fill in what a LoRA adapts in a model without prompts, its attention, where nothing was set."""
    settings = config.text_to_image
    if settings.train != "lora" or settings.lora_targets != TextToImageConfig().lora_targets:
        return config
    return config.model_copy(update={"text_to_image": settings.model_copy(update={"lora_targets": ATTENTION})})


def unprompted_weights(config: Config, network: nn.Module) -> list[str]:
    """Names of the weights to train, or that a LoRA is to adapt.

    The default of models with prompts, cross-attention, is none of a network without prompts: it stands for all.

    Raises:
        UserError: The selection is one of nothing.
    """
    settings = config.text_to_image
    if settings.train == TextToImageConfig().train:
        return select(network, "full")
    if settings.train == "lora" and settings.lora_targets == ATTENTION and not has_attention(network):
        raise UserError(
            f"A LoRA adapts attention, of which this {type(network).__name__} has none: train its own weights by "
            "--train full, or name the layers, such as text_to_image.lora_targets=re:resnets."
        )
    return selected_weights(config, network)


def _by_number(config: Config, names: tuple[str, ...], split: LabelledSplit) -> Config:
    """``config`` with all classes by number."""
    numbers = {
        name: None if value is None else class_numbers(value, names)
        for name, value in (("retain", config.unlearn.retain), ("relabel_to", config.unlearn.relabel_to))
    }
    settings = config.unlearn.model_copy(update={"forget": split.forgotten, **numbers})
    return config.model_copy(update={"unlearn": settings})


def _batches(
    config: Config, model: UnpromptedModel, console: Console, split: LabelledSplit, *, rehearse: bool
) -> tuple[Batches, Batches, ImageLists | None]:
    """(retain, forget), of noise for a rehearsal on images that would have to be read, and lists of a run's images."""
    settings = config.unlearn
    batches = labelled_batches(
        config,
        model,
        console,
        {Stream.RETAIN: split.retain, Stream.FORGET: split.forget},
        batch_size=settings.batch_size,
        setting="unlearn.batch_size",
        seen=batches_seen(config),
        dropout={Stream.RETAIN: settings.retain_label_dropout, Stream.FORGET: settings.forget_label_dropout},
        rehearse=rehearse,
    )
    retain, forget = batches[Stream.RETAIN], batches[Stream.FORGET]
    if rehearse:
        return retain, forget, None
    assert isinstance(forget, SampleBatches)
    if isinstance(split.forget, Images) and isinstance(split.retain, Images):
        images, lists = None, lists_of_tensors(split.forget, split.retain, DIGITS)
    else:
        images, lists = _cached(forget), ImageLists(_listed(split.forget, forget), _listed(split.retain, retain))
    return retain, forget, replace(lists, warning=unseen_warning(config, forget.order, images, len(lists.forget)))


def _cached(batches: Batches) -> CachedImages:
    assert isinstance(batches, CachedBatches)
    return batches.images


def _listed(samples: Samples, batches: Batches) -> tuple[ListedImage, ...]:
    """The images that ``batches`` are of."""
    assert not isinstance(samples, Images)
    return listed_images(samples, _cached(batches), "class")


def resolved(config: Config, *, conditional: bool, retain: Samples, forget: Samples = ()) -> Config:
    """Fill in the defaults of the kind of model, wherever nothing was set."""
    forgotten = labels_of(forget)
    retained = [label for label in labels_of(retain) if label not in forgotten]
    defaults = METHOD_SPECS[config.unlearn.method].defaults(config, "pixel")
    settings = config.unlearn.resolved(
        conditional=conditional, retained=retained, forgotten=forgotten, method_defaults=defaults
    )
    if conditional and settings.target == "relabel" and not retained and not config.unlearn.relabel_to:
        raise UserError(
            "Every class has forgotten images, so there is none to relabel to: choose --target uniform or gaussian."
        )
    unknown = set(settings.relabel_to or ()) - set(labels_of(retain))
    if unknown:
        raise UserError(
            f"Cannot relabel the forgotten class to {', '.join(map(str, sorted(unknown)))}: choose a retained class."
        )
    return config.model_copy(update={"unlearn": settings})


def relabelling(settings: UnlearnConfig, model: UnpromptedModel, teacher: Callable[[], nn.Module]) -> Relabel:
    """Relabelling target: another class. UserError for a model without classes."""
    if model.condition != "class":
        raise UserError("The target relabel needs a class-conditional model; use uniform or gaussian.")
    if not settings.relabel_to:
        raise UserError("There is no class to relabel to: name one in unlearn.relabel_to, or leave the setting out.")
    choices = {"class_labels": torch.tensor(settings.relabel_to)}
    return Relabel(choices, teacher() if settings.teacher == "frozen" else None)

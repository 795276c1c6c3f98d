"""Unlearning runs of models without prompts: classes and images, in pixels or in latents."""

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
from erasediff.training.job import set_up_device
from erasediff.training.loop import Batches
from erasediff.verdict.quick import QuickQuestion
from erasediff.workflows.build_method import (
    differs_by_training,
    needed_batches,
    selected_weights,
)
from erasediff.workflows.goal import question_of
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
from erasediff.workflows.load_model import check_pixel_precision, load_unprompted, refuse_text_to_image_settings
from erasediff.workflows.seen_images import batches_seen, unseen_warning
from erasediff.workflows.unlearning_run import RunBatches, UnlearningRun

ATTENTION = "selfattn"
"""What a LoRA adapts by default where there is no cross-attention."""


class LabelledRun(UnlearningRun):
    """Run of a model without prompts, class-conditional or not, on images with a class or without.

    Args:
        config: Settings that are not set take the defaults of the kind of model.
        model: Takes the place of the configuration's.
        console: Console for progress bars and notes.
        data: Takes the place of the configuration's, such as one of ``from_torch_dataset``.

    Raises:
        UserError: A class or file does not exist, forget and retain sets are empty or overlap, or model and data do
            not fit.
    """

    model: PixelModel | UnpromptedLatentModel

    def __init__(
        self,
        config: Config,
        model: PixelModel | UnpromptedLatentModel | None,
        console: Console,
        data: ImageSet | None = None,
    ) -> None:
        refuse_text_to_image_settings(config)
        check_pixel_precision(config)
        refuse_prompt_settings(config.images)
        check_unprompted(config)
        config = for_data(config, data)
        device = set_up_device(config)
        labelled = open_data(config, data)
        self._split = labelled.split(config)
        self.console = console
        # A model that was given may have been trained since it was read.
        self.is_measured = model is None and differs_by_training(config)
        source = config.unlearn.model
        if model is None:
            assert source is not None
            model = load_unprompted(source, device, console, lora_file=config.text_to_image.lora, empty=True)
        self.model = labelled.fit(model, source).to(device)
        self.config = resolved(
            _by_number(for_unprompted(config), labelled.class_names, self._split),
            conditional=self.model.condition == "class",
            retain=self._split.retain,
            forget=self._split.forget,
        )
        if self.model.null_label is None and self.model.condition == "class":
            # There is no label to drop to.
            console.print("The model has no null label, so labels are not dropped.", highlight=False)

    def selected_weights(self) -> list[str]:
        return unprompted_weights(self.config, self.model.denoiser)

    def set_up_denoiser(self) -> None:
        if self.config.text_to_image.gradient_checkpointing:
            network: Any = self.model.denoiser
            network.enable_gradient_checkpointing()

    def batches(self, *, rehearse: bool) -> RunBatches:
        """See ``UnlearningRun``; images in memory need no rehearsal, and are taken as they are."""
        settings = self.config.unlearn
        batches = labelled_batches(
            self.config,
            self.model,
            self.console,
            {Stream.RETAIN: self._split.retain, Stream.FORGET: self._split.forget},
            batch_size=settings.batch_size,
            setting="unlearn.batch_size",
            seen=batches_seen(self.config),
            dropout={Stream.RETAIN: settings.retain_label_dropout, Stream.FORGET: settings.forget_label_dropout},
            rehearse=rehearse,
        )
        retain, forget = batches[Stream.RETAIN], batches[Stream.FORGET]
        return RunBatches(retain, forget, None if rehearse else self._lists(retain, forget))

    def _lists(self, retain: Batches, forget: Batches) -> ImageLists:
        split = self._split
        assert isinstance(forget, SampleBatches)
        if isinstance(split.forget, Images) and isinstance(split.retain, Images):
            images, lists = None, lists_of_tensors(split.forget, split.retain, DIGITS)
        else:
            images, lists = _cached(forget), ImageLists(_listed(split.forget, forget), _listed(split.retain, retain))
        return replace(lists, warning=unseen_warning(self.config, forget.order, images, len(lists.forget)))

    def question(self, batches: RunBatches) -> QuickQuestion | None:
        return question_of(self.config, self.model, batches.lists, self.model.sample_shape)

    def conditioning(self, batches: RunBatches) -> dict[str, Any]:
        return {"relabel": partial(relabelling, self.config.unlearn, self.model)}


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

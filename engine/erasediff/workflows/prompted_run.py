"""Unlearning runs of text-to-image models: images with captions, prompts, the anchor."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from erasediff.config import Config, for_text_to_image
from erasediff.data.encoder_outputs import encode_prompts
from erasediff.data.image_lists import ImageLists
from erasediff.data.sources import check_location
from erasediff.diffusion.targets import Relabel
from erasediff.errors import UserError
from erasediff.methods import METHOD_SPECS
from erasediff.models.attention import set_attention, use_backend
from erasediff.models.base import LatentModel
from erasediff.training.job import precision_of, set_up_device
from erasediff.verdict.judges.base import Candidate
from erasediff.verdict.quick import QuickQuestion
from erasediff.workflows.anchor_selection import Encode, anchor_candidates, anchored, needs_anchor
from erasediff.workflows.build_method import (
    NoBatches,
    differs_by_training,
    needed_batches,
    selected_weights,
)
from erasediff.workflows.goal import question_of
from erasediff.workflows.latent_data import image_size, latent_batches, rehearsal_batches
from erasediff.workflows.load_model import load_checkpoint
from erasediff.workflows.unlearning_run import RunBatches, UnlearningRun


class PromptedRun(UnlearningRun):
    """Run of a text-to-image model, on images with captions, on prompts, or on both.

    Args:
        config: Settings that are not set take the defaults of text-to-image models.
        console: Console for progress bars and notes.

    Raises:
        UserError: For mistakes that show without an image: in the checkpoint, in the settings.
    """

    model: LatentModel

    def __init__(self, config: Config, console: Console) -> None:
        complete = with_latent_defaults(config)
        self.console = console
        self.is_measured = differs_by_training(complete)
        self.model = load_checkpoint(complete, _checked(complete), set_up_device(complete), empty=True)
        weights = sum(parameter.numel() for parameter in self.model.denoiser.parameters())
        self.config = with_latent_defaults(config, weights)
        self._attention: str | None = None
        # Needs the text encoders once for each list of prompts.
        self._encode: Encode = cache(lambda prompts: encode_prompts(self.model, prompts))

    def selected_weights(self) -> list[str]:
        return selected_weights(self.config, self.model.denoiser)

    def set_up_denoiser(self) -> None:
        """Choose the attention backend of the empty denoiser, and set up that or the one that took its place.

        Raises:
            UserError: The backend cannot run here.
        """
        network: Any = self.model.denoiser
        if self._attention is None:
            precision = precision_of(self.config)
            attention = self.config.text_to_image.attention
            chosen = set_attention(network, attention, dtype=precision, device=self.model.device)
            self.console.print(f"Attention: {chosen}.")
            self._attention = chosen.backend
        use_backend(network, self._attention)
        if self.config.text_to_image.gradient_checkpointing:
            network.enable_gradient_checkpointing()

    def batches(self, *, rehearse: bool) -> RunBatches:
        """See ``UnlearningRun``; the prompts of the method are encoded too. Empty for a method without images."""
        batches = self._batches(rehearse=rehearse)
        for prompts in _encoded_prompts(self.config, batches.lists):
            self._encode(prompts)
        return batches

    def _batches(self, *, rehearse: bool) -> RunBatches:
        if not needed_batches(self.config):
            return RunBatches(NoBatches(), NoBatches(), None)
        if rehearse:
            return RunBatches(*rehearsal_batches(self.config, self.model), None)
        return RunBatches(*latent_batches(self.config, self.model, self.console, self.load_denoiser))

    def question(self, batches: RunBatches) -> QuickQuestion | None:
        size = image_size(self.config, self.model)
        return question_of(self.config, self.model, batches.lists, self.model.latent_shape(*size), size)

    def with_anchors(self, question: QuickQuestion) -> QuickQuestion:
        known = {candidate.text for candidate in question.others}
        anchors = [
            Candidate(text, text, prompt_condition(self.config, self.model, self._encode, (text,)))
            for text in self.config.text_to_image.anchor_prompts
            if text not in known
        ]
        return replace(question, others=[*question.others, *anchors])

    def conditioning(self, batches: RunBatches) -> dict[str, Any]:
        """See ``UnlearningRun``; the anchor prompt is chosen first, where none is given."""
        self.config = anchored(self.config, self.model, batches.lists, batches.forget, self._encode, self.console)
        return {
            "optimizer_options": {
                "stochastic_rounding": self.config.text_to_image.weights == "bfloat16",
                "seed": self.config.seed,
            },
            "relabel": partial(relabelling, self.config, self._encode),
            "encode_prompts": partial(prompt_condition, self.config, self.model, self._encode),
            "latent_shape": partial(self.model.latent_shape, *image_size(self.config, self.model)),
        }


def with_latent_defaults(config: Config, weights: int | None = None) -> Config:
    """Fill in the defaults of text-to-image models, and of the method, wherever nothing was set.

    ``weights``: see ``for_text_to_image``.
    """
    defaults = METHOD_SPECS[config.unlearn.method].defaults(config, "latent")
    return for_text_to_image(config, defaults, weights=weights)


def _checked(config: Config) -> Path:
    """Path of the checkpoint to unlearn from. UserError for mistakes that show without reading it."""
    settings = config.unlearn
    if settings.model is None:
        raise UserError("There is no model to unlearn from; name one with --model.")
    if settings.forget or settings.retain or settings.relabel_to:
        raise UserError(
            "A model with prompts has no class labels: choose images with --forget-class, or say what captions have."
        )
    for source in (config.images.data, config.images.forget_data):
        if source is not None:
            check_location(source)
    return settings.model


def _encoded_prompts(config: Config, lists: ImageLists | None) -> Iterator[tuple[str, ...]]:
    """Lists of prompts that the method may encode."""
    spec = METHOD_SPECS[config.unlearn.method]
    if needs_anchor(config):
        yield from ((caption,) for caption in anchor_candidates(lists))
    elif spec.needs(config).relabel:
        yield config.text_to_image.anchor_prompts
    yield from (tuple(prompts) for prompts in spec.prompts(config) if prompts)


def prompt_condition(config: Config, model: LatentModel, encode: Encode, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Condition of each prompt for an image of the configuration's size."""
    size = image_size(config, model)
    return encode(tuple(prompts)) | model.size_condition(size, (0, 0), size, len(prompts))


def relabelling(config: Config, encode: Encode, teacher: Callable[[], nn.Module]) -> Relabel:
    """Relabelling target: the anchor prompts."""
    anchors = encode(config.text_to_image.anchor_prompts)
    choices = {name: tensor.to(torch.float32) for name, tensor in anchors.items()}
    return Relabel(choices, teacher() if config.unlearn.teacher == "frozen" else None)

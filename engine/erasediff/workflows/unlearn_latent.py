"""Unlearn images or concepts from a text-to-image model, with any of the methods."""

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
from erasediff.methods.base import Solver
from erasediff.methods.salun import keep_to_the_salient
from erasediff.models.attention import set_attention, use_backend
from erasediff.models.base import LatentModel
from erasediff.training.job import TrainingJob, loads_sharded, precision_of, set_up_device, thread_scope
from erasediff.training.loop import Batches
from erasediff.training.run_size import check_storage, run_bytes
from erasediff.workflows.anchor_selection import Encode, anchor_candidates, anchored, needs_anchor
from erasediff.workflows.build_method import (
    NoBatches,
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
from erasediff.workflows.latent_data import image_size, latent_batches, rehearsal_batches
from erasediff.workflows.load_model import load_checkpoint, read_denoiser


@thread_scope()
def text_to_image_job(
    config: Config, console: Console, *, rehearse: bool = False, out: Path | None = None
) -> TrainingJob:
    """Build the job that unlearns ``config.images`` from the checkpoint ``config.unlearn.model``.

    Text encoders and VAE are never in memory together with the denoiser, but where images of prompts are drawn. They
    encode images and captions, which are cached, and the prompts of the method; when they have left memory, the
    denoiser's weights are read.

    Args:
        config: Settings that are not set take the defaults of text-to-image models.
        console: Console for progress bars and notes.
        rehearse: Build a run to be measured instead, on noise, and write nothing.
        out: Folder of the run, whose disk must have room for it; None checks no disk.

    Raises:
        UserError: For every mistake in checkpoint, images and settings, before anything is written but caches.
    """
    config = with_latent_defaults(config)
    source = _checked(config)
    model = load_checkpoint(config, source, set_up_device(config), empty=True)
    check_output(config, model)
    load_denoiser = partial(_load_denoiser, config, model, _choose_attention(config, model, console))
    selected = selected_weights(config, model.denoiser)
    if out is not None:
        trained = [] if config.text_to_image.train == "lora" else map(model.denoiser.get_parameter, selected)
        size = run_bytes(config, config.unlearn, model.denoiser, trained, saved_bytes(config, model))
        check_storage(out, size)
    # Before a LoRA is added: images for prompts are the original model's.
    retain, forget, lists = _batches(config, model, console, load_denoiser, rehearse=rehearse)
    encode = _cached_encoder(model)
    for prompts in _encoded_prompts(config, lists):
        encode(prompts)
    model.release_encoders()
    if not loads_sharded(config):
        load_denoiser()
    config = anchored(config, model, lists, forget, encode, console)
    parameters = method_parameters(config, model.denoiser, selected)
    job = build_training_job(
        config,
        UnlearningModel(
            network=model.denoiser,
            process=model.process,
            predict=model.predict,
            save=partial(save_unlearned, config, model),
            saved_bytes=saved_bytes(config, model),
            is_measured=differs_by_training(config),
            saved_as=output_name(config),
            weights=model.denoiser_weights if model.denoiser_is_meta else None,
            optimizer_options={
                "stochastic_rounding": config.text_to_image.weights == "bfloat16",
                "seed": config.seed,
            },
            relabel=partial(relabelling, config, encode),
            encode_prompts=partial(prompt_condition, config, model, encode),
            latent_shape=partial(model.latent_shape, *image_size(config, model)),
        ),
        parameters,
        retain,
        forget,
    )
    model.release_encoders()
    if config.text_to_image.saliency is not None:
        assert isinstance(job.method, Solver)
        batches = map(forget.at, range(config.text_to_image.saliency_batches))
        keep_to_the_salient(job.method, batches, share=config.text_to_image.saliency)
    return replace(job, lists=lists)


def with_latent_defaults(config: Config) -> Config:
    """Fill in the defaults of text-to-image models, and of the method, wherever nothing was set."""
    return for_text_to_image(config, METHOD_SPECS[config.unlearn.method].defaults(config, "latent"))


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


def _batches(
    config: Config, model: LatentModel, console: Console, load_denoiser: Callable[[], None], *, rehearse: bool
) -> tuple[Batches, Batches, ImageLists | None]:
    """(retain, forget), both empty for a method that looks at no images, and lists of the images of a real run."""
    if not needed_batches(config):
        return NoBatches(), NoBatches(), None
    if rehearse:
        return *rehearsal_batches(config, model), None
    return latent_batches(config, model, console, load_denoiser)


def _cached_encoder(model: LatentModel) -> Encode:
    """``model.encode_prompts``, which needs the text encoders once for each list of prompts."""
    return cache(lambda prompts: encode_prompts(model, prompts))


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


def _choose_attention(config: Config, model: LatentModel, console: Console) -> str:
    """Set the attention backend of the empty denoiser. UserError for one that cannot run here."""
    chosen = set_attention(
        model.denoiser, config.text_to_image.attention, dtype=precision_of(config), device=model.device
    )
    console.print(f"Attention: {chosen}.")
    _set_up(config, model.denoiser, chosen.backend)
    return chosen.backend


def _load_denoiser(config: Config, model: LatentModel, attention: str) -> None:
    """Read the denoiser's weights, and set it up as the empty one."""
    read_denoiser(config, model)
    _set_up(config, model.denoiser, attention)


def _set_up(config: Config, network: Any, attention: str) -> None:
    use_backend(network, attention)
    if config.text_to_image.gradient_checkpointing:
        network.enable_gradient_checkpointing()


def relabelling(config: Config, encode: Encode, teacher: Callable[[], nn.Module]) -> Relabel:
    """Relabelling target: the anchor prompts."""
    anchors = encode(config.text_to_image.anchor_prompts)
    choices = {name: tensor.to(torch.float32) for name, tensor in anchors.items()}
    return Relabel(choices, teacher() if config.unlearn.teacher == "frozen" else None)

"""The method that a configuration asks for, on any network."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from erasediff.config import Config, UnlearnConfig, differences
from erasediff.diffusion.batch import Batch, Denoiser, diffusers_denoiser
from erasediff.diffusion.noise_schedule import Process
from erasediff.diffusion.targets import Relabel
from erasediff.errors import UserError
from erasediff.methods import METHOD_SPECS, BuildContext, Method
from erasediff.methods.base import SolverOptions
from erasediff.models import lora
from erasediff.models.base import TextToImageModel
from erasediff.models.trainable import select, train_only
from erasediff.parallel.factory import gradients_for
from erasediff.parallel.init import share_of
from erasediff.training.job import precision_of
from erasediff.training.loop import Batches
from erasediff.training.lr_schedule import LearningRate
from erasediff.training.run_dir import MODEL, SINGLE_FILE
from erasediff_kernels import ConstrainedAdamW

ADAPTERS = "lora.safetensors"


def selected_weights(config: Config, network: nn.Module) -> list[str]:
    """Names of the weights that are trained, or that a LoRA is to adapt. UserError for a selection of nothing."""
    settings = config.text_to_image
    return select(network, settings.lora_targets if settings.train == "lora" else settings.train)


def trained_parameters(config: Config, network: nn.Module, selected: list[str]) -> list[nn.Parameter]:
    """The parameters to train, those ``selected`` or adapters of theirs; all others are frozen."""
    settings = config.text_to_image
    if settings.train != "lora":
        return train_only(network, selected)
    return lora.add(network, rank=settings.lora_rank, alpha=settings.lora_alpha, targets=selected, seed=config.seed)


def check_output(config: Config, model: TextToImageModel) -> None:
    """UserError for a layout or keys that the family does not have: better now than when the work is done."""
    settings, training_lora = config.output, config.text_to_image.train == "lora"
    if training_lora and config.text_to_image.saliency is not None:
        raise UserError("Saliency chooses among the model's own weights: omit it with --train lora.")
    if model.original_layout is not None:
        return
    if settings.layout == "single-file":
        raise UserError(f"A {model.family} model has no single-file layout here: set output.layout to diffusers.")
    if training_lora and settings.lora_keys == "kohya":
        raise UserError(
            f"A LoRA of the family {model.family} has no kohya keys here: set output.lora_keys to diffusers."
        )


def output_name(config: Config) -> str:
    """What the model is called in the run's folder."""
    return MODEL if config.output.layout == "diffusers" else SINGLE_FILE


def save_unlearned(config: Config, model: TextToImageModel, path: Path) -> None:
    """Write the model to ``path``; a LoRA also as a file of its own beside it, and merged into the model."""
    settings = config.output
    if config.text_to_image.train == "lora":
        lora.save(model.denoiser_module, path.with_name(ADAPTERS), family=model.family, keys=settings.lora_keys)
        lora.merge(model.denoiser_module)
    model.save(
        path,
        layout=settings.layout,
        dtype=None if settings.dtype is None else getattr(torch, settings.dtype),
        max_shard_size=settings.max_shard_bytes,
        replace=True,
    )


SECTIONS = {
    "esd": ("esd", "pruning"),
    "pruning": ("pruning",),
    "salun": ("salun",),
    "selective_amnesia": ("selective-amnesia",),
}
"""The methods that read a section of the configuration which not all of them read."""


def needed_batches(config: Config) -> bool:
    """Whether the method looks at images at all. UserError for settings that it does not read."""
    method = config.unlearn.method
    for name in differences(Config(), config):
        readers = SECTIONS.get(name.partition(".")[0])
        if readers is not None and method not in readers:
            raise UserError(f"The setting {name} is for --method {' and '.join(readers)}, not for {method}.")
    needs = METHOD_SPECS[method].needs(config)
    return needs.retain or needs.forget


@dataclass(frozen=True, slots=True)
class NoBatches:
    """What a method that needs no images is given."""

    def at(self, step: int) -> Batch:
        return {}


def _no_prompts(prompts: Sequence[str] = ()) -> dict[str, Tensor]:
    raise UserError("This method needs a concept's prompts: give a text-to-image model and --forget-prompts.")


def _no_latents() -> tuple[int, ...]:
    raise UserError("This method needs a concept's prompts: give a text-to-image model and --forget-prompts.")


def unlearning_method(
    config: Config,
    network: nn.Module,
    optimizer: ConstrainedAdamW,
    *,
    process: Process,
    relabel: Callable[[], Relabel],
    teacher: Callable[[], nn.Module],
    denoiser: Denoiser = diffusers_denoiser,
    retain: Batches | None = None,
    forget: Batches | None = None,
    encode_prompts: Callable[[Sequence[str]], dict[str, Tensor]] = _no_prompts,
    latent_shape: Callable[[], tuple[int, ...]] = _no_latents,
) -> Method:
    """``config.unlearn.method`` about to train ``network``; see ``BuildContext`` for what it may be made of."""
    settings = config.unlearn
    options: SolverOptions = {
        "denoiser": denoiser,
        "min_snr_gamma": settings.min_snr_gamma,
        "antithetic": settings.antithetic,
        "max_grad_norm": settings.max_grad_norm,
        "accumulation_steps": settings.accumulation_steps,
        "autocast": precision_of(config),
        "seed": config.seed,
    }
    if not config.distributed.own_reduction:
        options["gradients"] = gradients_for(network, optimizer, own_reduction=False)
    return METHOD_SPECS[settings.method].make(
        BuildContext(
            config=config,
            network=network,
            optimizer=optimizer,
            process=process,
            denoiser=denoiser,
            options=options,
            relabel=relabel,
            teacher=teacher,
            encode_prompts=encode_prompts,
            latent_shape=latent_shape,
            prompts=config.images.forget_prompts,
            batch_size=settings.batch_size // share_of(settings.batch_size, "unlearn.batch_size")["world_size"],
            forget_batches=lambda count: _first(forget, count),
            retain_batches=lambda count: _first(retain, count),
        )
    )


def _first(batches: Batches | None, count: int) -> Iterable[Batch]:
    assert batches is not None
    return map(batches.at, range(count))


def learning_rate(settings: UnlearnConfig) -> LearningRate:
    """The learning rate at every step."""
    assert settings.lr is not None
    assert settings.steps is not None
    return LearningRate(settings.lr, settings.steps, settings.warmup_steps, settings.lr_schedule)


def method_parameters(config: Config, network: nn.Module, selected: Sequence[str] | None = None) -> list[nn.Parameter]:
    """The parameters that the method trains, where it may change the weights ``selected``; None: all of them."""
    trained = METHOD_SPECS[config.unlearn.method].trained
    if trained is None:
        return list(network.parameters()) if selected is None else trained_parameters(config, network, list(selected))
    if config.text_to_image.train == "lora":
        raise UserError(
            f"The method {config.unlearn.method} has parameters of its own: choose weights with --train, not lora."
        )
    return trained(config, network, [name for name, _ in network.named_parameters()] if selected is None else selected)


def finished_and_saved(method: Method, save: Callable[[Path], None], path: Path) -> None:
    """Write what the method leaves beside the model at ``path``, and the model with ``save``."""
    finish = METHOD_SPECS[method.name].finish
    if finish is not None:
        finish(method, path)
    save(path)

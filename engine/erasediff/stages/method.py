"""The method that a configuration asks for, on any network."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from erasediff.config import Config, UnlearnConfig, differences
from erasediff.distributed.joining import share_of
from erasediff.errors import UserError
from erasediff.methods import RECIPES, Materials, Method
from erasediff.objectives import Batch, Denoiser, Relabel, diffusers_denoiser
from erasediff.process import Process
from erasediff.runs.loop import Batches
from erasediff.runs.schedule import LearningRate
from erasediff.solver import SolverOptions
from erasediff.stages.session import precision_of
from erasediff.stages.trained_weights import trained_parameters
from erasediff_kernels import ConstrainedAdamW

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
    needs = RECIPES[method].needs(config)
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
    """``config.unlearn.method`` about to train ``network``; see ``Materials`` for what it may be made of."""
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
    return RECIPES[settings.method].make(
        Materials(
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
    trained = RECIPES[config.unlearn.method].trained
    if trained is None:
        return list(network.parameters()) if selected is None else trained_parameters(config, network, list(selected))
    if config.text_to_image.train == "lora":
        raise UserError(
            f"The method {config.unlearn.method} has parameters of its own: choose weights with --train, not lora."
        )
    return trained(config, network, [name for name, _ in network.named_parameters()] if selected is None else selected)


def finished_and_saved(method: Method, save: Callable[[Path], None], path: Path) -> None:
    """Write what the method leaves beside the model at ``path``, and the model with ``save``."""
    finish = RECIPES[method.name].finish
    if finish is not None:
        finish(method, path)
    save(path)

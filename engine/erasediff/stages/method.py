"""The method that a configuration asks for, on any network."""

import copy
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

from erasediff.config import Config, UnlearnConfig
from erasediff.errors import UserError
from erasediff.methods import RECIPES, Materials, Method
from erasediff.objectives import Batch, Denoiser, Relabel, diffusers_denoiser
from erasediff.process import Process
from erasediff.runs.loop import Batches
from erasediff.runs.schedule import LearningRate
from erasediff.solver import SolverOptions
from erasediff.stages.session import precision_of
from erasediff_kernels import ConstrainedAdamW


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
            teacher=lambda: copy.deepcopy(network).requires_grad_(False).eval(),
            encode_prompts=encode_prompts,
            latent_shape=latent_shape,
            prompts=config.images.forget_prompts,
            batch_size=settings.batch_size,
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

"""The method that a configuration asks for, on any network."""

from collections.abc import Callable
from typing import Any

from torch import nn

from erasediff.config import Config, UnlearnConfig
from erasediff.methods import METHODS, Method
from erasediff.objectives import Denoiser, DeviationTarget, GaussianNoise, Relabel, UniformNoise, diffusers_denoiser
from erasediff.process import Process
from erasediff.runs.schedule import LearningRate
from erasediff.solver import Barrier, Cosine, Fixed, Gap, InnerSolve, Norm
from erasediff.stages.session import precision_of
from erasediff_kernels import ConstrainedAdamW


def unlearning_method(
    config: Config,
    network: nn.Module,
    optimizer: ConstrainedAdamW,
    *,
    process: Process,
    relabel: Callable[[], Relabel],
    denoiser: Denoiser = diffusers_denoiser,
) -> Method:
    """``config.unlearn.method`` about to train ``network``; ``relabel`` makes the target of that name."""
    settings = config.unlearn
    return METHODS[settings.method](
        network,
        optimizer,
        process=process,
        denoiser=denoiser,
        min_snr_gamma=settings.min_snr_gamma,
        antithetic=settings.antithetic,
        max_grad_norm=settings.max_grad_norm,
        accumulation_steps=settings.accumulation_steps,
        autocast=precision_of(config),
        seed=config.seed,
        **(_own_options(settings, relabel) if settings.method == "erasediff" else {}),
    )


def learning_rate(settings: UnlearnConfig) -> LearningRate:
    """The learning rate at every step."""
    assert settings.lr is not None
    assert settings.steps is not None
    return LearningRate(settings.lr, settings.steps, settings.warmup_steps, settings.lr_schedule)


def _own_options(settings: UnlearnConfig, relabel: Callable[[], Relabel]) -> dict[str, Any]:
    """The options that only EraseDiff takes."""
    return {
        "barrier": barrier_of(settings),
        "target": _target_of(settings, relabel),
        "inner": InnerSolve(
            steps=settings.inner_steps, lr=settings.inner_lr, refresh_every=settings.inner_refresh_every
        ),
    }


def barrier_of(settings: UnlearnConfig) -> Barrier:
    """The barrier by its name, with ``eta`` as its number."""
    assert settings.eta is not None
    barriers: dict[str, Callable[[float], Barrier]] = {"norm": Norm, "gap": Gap, "fixed": Fixed, "cosine": Cosine}
    return barriers[settings.barrier](settings.eta)


def _target_of(settings: UnlearnConfig, relabel: Callable[[], Relabel]) -> DeviationTarget:
    match settings.target:
        case "uniform":
            return UniformNoise()
        case "gaussian":
            return GaussianNoise()
        case _:
            return relabel()

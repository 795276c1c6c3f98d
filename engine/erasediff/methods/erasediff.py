"""EraseDiff as a configuration describes it; the method itself is ``erasediff.solver.EraseDiff``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from erasediff.config import Config, UnlearnConfig
from erasediff.methods.protocol import Materials, Needs, Recipe
from erasediff.objectives import DeviationTarget, GaussianNoise, Relabel, UniformNoise
from erasediff.solver import Barrier, Cosine, EraseDiff, Fixed, Gap, InnerSolve, Norm


def barrier_of(settings: UnlearnConfig) -> Barrier:
    """The barrier by its name, with ``eta`` as its number."""
    assert settings.eta is not None
    barriers: dict[str, Callable[[float], Barrier]] = {"norm": Norm, "gap": Gap, "fixed": Fixed, "cosine": Cosine}
    return barriers[settings.barrier](settings.eta)


def target_of(settings: UnlearnConfig, relabel: Callable[[], Relabel]) -> DeviationTarget:
    """The target by its name."""
    match settings.target:
        case "uniform":
            return UniformNoise()
        case "gaussian":
            return GaussianNoise()
        case _:
            return relabel()


def own_options(materials: Materials) -> dict[str, Any]:
    """The options that only EraseDiff takes."""
    settings = materials.config.unlearn
    return {
        "barrier": barrier_of(settings),
        "target": target_of(settings, materials.relabel),
        "retain_teacher": materials.teacher() if settings.retain_target == "teacher" else None,
        "inner": InnerSolve(
            steps=settings.inner_steps, lr=settings.inner_lr, refresh_every=settings.inner_refresh_every
        ),
    }


def make(materials: Materials) -> EraseDiff:
    return EraseDiff(
        materials.network,
        materials.optimizer,
        process=materials.process,
        **own_options(materials),
        **materials.options,
    )


def needs(config: Config) -> Needs:
    """What ``own_options`` will ask for."""
    settings = config.unlearn
    relabel = settings.target == "relabel"
    teacher = settings.retain_target == "teacher" or (relabel and settings.teacher == "frozen")
    return Needs(teacher=teacher, relabel=relabel)


RECIPE = Recipe(name=EraseDiff.name, make=make, needs=needs)

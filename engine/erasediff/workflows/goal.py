"""Goal of a run that goes on until it has forgotten: what its looks ask, and the rounds that follow from them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from rich.console import Console
from torch import nn

from erasediff.config import Config
from erasediff.data.image_lists import ImageLists, ListedImage
from erasediff.diffusion.batch import Denoiser
from erasediff.errors import UserError
from erasediff.methods import METHOD_SPECS
from erasediff.methods.base import Solver
from erasediff.models.base import LatentModel
from erasediff.parallel.control_plane import ControlPlane
from erasediff.training.rounds import Rounds
from erasediff.verdict.candidates import candidates_of
from erasediff.verdict.examined import AnyModel, ExaminedModel
from erasediff.verdict.quick import SAMPLES, QuickLook, QuickQuestion, UntilForgotten
from erasediff.verdict.request import Request

ROUNDS = 4
"""Rounds at most, unless ``unlearn.max_steps`` says otherwise."""
SMALL = 4 * 32 * 32
"""Elements of a sample of which ``SAMPLES`` fit wherever a step does."""
SEED = 2_000_003
"""Added to the run's seed: a look's noise is neither that of the run nor that of its verdict."""


def goes_in_rounds(config: Config) -> bool:
    """Return true if a run of ``config``, as its user wrote it, is to go on until it has forgotten.

    Raises:
        UserError: It is, with a method for which more steps do not forget more.
    """
    settings, spec = config.unlearn, METHOD_SPECS[config.unlearn.method]
    can = "until" in spec.reads(config)
    if settings.until == "forgotten" and not can:
        raise UserError(f"The method {spec.name} does not go on until it has forgotten: omit --until.")
    return settings.until == "forgotten" or (settings.until is None and settings.steps is None and can)


def question_of(
    config: Config,
    model: AnyModel,
    lists: ImageLists | None,
    shape: tuple[int, ...],
    size: tuple[int, int] | None = None,
) -> QuickQuestion | None:
    """What a look asks; None for a run that seeks no caption or class in what is drawn.

    It needs the text encoders.

    Args:
        config: Configuration with all defaults.
        model: The model before the run.
        lists: Images of the run; None for a rehearsal, or a method without images.
        shape: (C, h, w) of a sample.
        size: (height, width) of an image in pixels, of a text-to-image model.
    """
    anchors = config.text_to_image.anchor_prompts
    if lists is not None:
        request = Request.of_lists(_records(lists.forget), _records(lists.retain), anchors=anchors)
    elif config.images.forget_prompts:
        request = Request.of_prompts(config.images.forget_prompts, config.images.retain_prompts, anchors=anchors)
    else:
        return None
    if request.kind != "concept" or model.condition == "none":
        return None
    examined = ExaminedModel(model=model, settings=config.sample, size=size)
    if not isinstance(model, LatentModel):
        relabels = METHOD_SPECS[config.unlearn.method].needs(config).relabel
        numbers = (config.unlearn.relabel_to or ()) if relabels else ()
        anchors = tuple(model.class_names[number] for number in numbers if isinstance(number, int))
    chosen = candidates_of(request, examined, anchors)
    others = [*chosen.retained, *chosen.others]
    if not others and isinstance(model, LatentModel):
        others = [examined.candidate("")]
    if not others:
        return None
    scale = config.sample.guidance_scale
    return QuickQuestion(
        sought=chosen.sought,
        others=others,
        null=examined.null_condition(),
        guidance_scale=model.default_guidance if scale is None else scale,
        shape=shape,
    )


def check_goal(config: Config, question: QuickQuestion | None) -> None:
    """Raise UserError for a run that was asked to go on until it has forgotten, and has nothing to look for."""
    settings = config.unlearn
    if question is None and (settings.until == "forgotten" or settings.max_steps or settings.max_minutes):
        raise UserError(
            "The run takes one round, since no look can tell when it has forgotten: no caption or class is forgotten "
            "as a whole, or --steps says when it ends. Omit --until, --max-steps and --max-minutes."
        )


def with_goal(config: Config, question: QuickQuestion | None) -> Config:
    """``config`` with ``unlearn.until``, which a resumed run needs, filled in."""
    until = "steps" if question is None else "forgotten"
    return config.model_copy(update={"unlearn": config.unlearn.model_copy(update={"until": until})})


def rounds_of(
    config: Config,
    method: Solver,
    teacher: Callable[[], nn.Module],
    denoiser: Denoiser,
    question: QuickQuestion,
) -> Callable[[Console], Rounds]:
    """Function of the run's console that returns its rounds."""
    settings = config.unlearn
    assert settings.steps is not None
    steps, original = settings.steps, teacher()
    look = QuickLook(
        method,
        original,
        method.objective.process,
        denoiser,
        question,
        seed=config.seed + SEED,
        # What a step has room for, in any number of processes alike; small samples go together.
        batch_size=SAMPLES if math.prod(question.shape) <= SMALL else min(SAMPLES, settings.batch_size),
    )
    began = time.monotonic()

    def is_late() -> bool:
        late = settings.max_minutes is not None and time.monotonic() - began > 60 * settings.max_minutes
        answer: bool = ControlPlane.current().broadcast_object(late)
        return answer

    def rounds(console: Console) -> Rounds:
        return UntilForgotten(
            look,
            steps=steps,
            max_steps=max(settings.max_steps or ROUNDS * steps, steps),
            limit=config.verdict.forgotten_limit,
            say=partial(console.print, highlight=False, markup=False, soft_wrap=True),
            is_late=is_late,
        )

    return rounds


def _records(images: tuple[ListedImage, ...]) -> Iterator[Mapping[str, object]]:
    """What a request reads of listed images."""
    for image in images:
        kind, value = image.condition
        record = {kind: value, "selected_by": image.selected_by}
        yield record if image.class_name is None else record | {"class": image.class_name}

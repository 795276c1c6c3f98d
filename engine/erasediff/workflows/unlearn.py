"""Commands on whatever model they are given: a text-to-image checkpoint, or a model of the digits."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from erasediff.config import Config
from erasediff.errors import UserError
from erasediff.training.job import TrainingJob
from erasediff.workflows.load_model import is_text_to_image, refuse_text_to_image_settings
from erasediff.workflows.sample import SampledImages, sample, sample_prompts
from erasediff.workflows.unlearn_latent import text_to_image_job
from erasediff.workflows.unlearn_pixel import pixel_unlearning_job


def unlearning_job(config: Config, console: Console, *, rehearse: bool) -> TrainingJob:
    """The unlearning run that suits ``config.unlearn.model``; ``rehearse`` it if it is only to be measured.

    UserError as in ``text_to_image_job`` and ``pixel_unlearning_job``, and for settings of the other kind of model.
    """
    if config.unlearn.model is not None and is_text_to_image(config.unlearn.model):
        return text_to_image_job(config, console, rehearse=rehearse)
    refuse_text_to_image_settings(config)
    return pixel_unlearning_job(config)


def draw_from(
    config: Config,
    model: Path,
    out: Path,
    console: Console,
    *,
    classes: Sequence[int] | None,
    prompts: Sequence[str] | None,
    count: int | None,
) -> SampledImages:
    """``count`` images of each prompt or class. UserError as in ``sample_prompts`` and ``sample``."""
    if not is_text_to_image(model):
        if prompts is not None:
            raise UserError(f"{model} is not a text-to-image model: omit the prompts.")
        return sample(config, model, out, console, classes=classes, count=count or 50)
    if prompts is None or classes is not None:
        raise UserError(f"{model} is a text-to-image model: say with --prompts what to draw, not with --classes.")
    return sample_prompts(config, model, out, console, prompts=prompts, count=count or 1)

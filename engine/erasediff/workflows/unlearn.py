"""Unlearning and sampling of any model: with prompts, with class labels, or with neither."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from erasediff.config import Config
from erasediff.data.sources import check_location
from erasediff.errors import UserError
from erasediff.io.disk_room import check_writable
from erasediff.methods import METHOD_SPECS
from erasediff.methods.spec import RunContext
from erasediff.training.job import StandaloneJob, TrainingJob, check_single_process, set_up_device
from erasediff.training.run_dir import RunPlace
from erasediff.verdict.judges.registry import judge_named
from erasediff.workflows.build_method import check_settings
from erasediff.workflows.build_unlearning import build_unlearning_job
from erasediff.workflows.earlier_requests import following
from erasediff.workflows.labelled_run import check_unprompted
from erasediff.workflows.load_model import is_text_to_image, load_checkpoint
from erasediff.workflows.prompted_run import with_latent_defaults
from erasediff.workflows.sample import SampledImages, sample, sample_prompts


def unlearning_job(
    config: Config, console: Console, place: RunPlace | None, given: Collection[str] = ()
) -> TrainingJob | StandaloneJob:
    """Build the unlearning job of ``config``.

    Args:
        config: Configuration as the user wrote it: defaults of the kind of model are filled in here.
        console: Console for progress bars.
        place: Folder to run in; None builds a job to be measured, which writes nothing.
        given: See ``check_settings``.

    Raises:
        UserError: As ``build_unlearning_job``, and for settings that the method or the kind of model does not read.
    """
    check_settings(config, given)
    config = following(config)
    source = config.unlearn.model
    if source is not None and not is_text_to_image(source):
        check_unprompted(config)
    check_single_process(config)
    if config.verdict.enabled:
        for reference in config.verdict.judges:
            # Before hours of work, not after them.
            judge_named(reference)
        if config.verdict.unseen_data is not None:
            check_location(config.verdict.unseen_data)
    spec = METHOD_SPECS[config.unlearn.method]
    if spec.run is not None:
        return _standalone_job(config, spec.run, place)
    if place is not None:
        place.check()
    out = None if place is None else place.path
    return build_unlearning_job(config, console=console, rehearse=place is None, out=out)


def _standalone_job(
    config: Config, run: Callable[[RunContext], dict[str, Any]], place: RunPlace | None
) -> StandaloneJob:
    """A job of a method without optimizer steps. UserError for a job that is to be measured or resumed."""
    method, source = config.unlearn.method, config.unlearn.model
    if place is None:
        raise UserError(f"The method {method} takes no optimizer steps, so there is none to measure: omit --dry-run.")
    if place.resuming:
        raise UserError(f"The method {method} continues by itself from what is in --out: omit --resume.")
    if source is None:
        raise UserError("There is no model to unlearn from; name one with --model.")
    check_writable(place.path)
    config = with_latent_defaults(config)

    def procedure(out: Path, console: Console) -> dict[str, Any]:
        load_model = partial(load_checkpoint, config, source, set_up_device(config))
        return run(RunContext(config=config, load_model=load_model, out=out, console=console))

    return StandaloneJob(config=config, procedure=procedure)


def draw_from(
    config: Config,
    model: Path,
    out: Path,
    console: Console,
    *,
    classes: Sequence[int | str] | None,
    prompts: Sequence[str] | None,
    count: int | None,
) -> SampledImages:
    """Sample ``count`` images of each prompt or class. UserError as in ``sample_prompts`` and ``sample``."""
    if not is_text_to_image(model):
        if prompts is not None:
            raise UserError(f"{model} is not a text-to-image model; omit --prompts.")
        return sample(config, model, out, console, classes=classes, count=count or 50)
    if prompts is None or classes is not None:
        raise UserError(
            f"{model} is a text-to-image model, which draws prompts; use --prompts in the place of --classes."
        )
    return sample_prompts(config, model, out, console, prompts=prompts, count=count or 1)

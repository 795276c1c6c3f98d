"""Unlearning jobs: one path for models with prompts, with class labels, or with neither."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from erasediff.config import Config
from erasediff.data import ImageSet
from erasediff.errors import UserError
from erasediff.methods.base import Solver
from erasediff.methods.salun import keep_to_the_salient
from erasediff.models.pixel_unet import PixelModel
from erasediff.models.unprompted_latents import UnpromptedLatentModel
from erasediff.training.job import TrainingJob, loads_sharded, thread_scope
from erasediff.training.run_size import check_storage, run_bytes
from erasediff.workflows.build_method import (
    UnlearningModel,
    build_training_job,
    check_output,
    method_parameters,
    output_name,
    save_unlearned,
    saved_bytes,
)
from erasediff.workflows.goal import check_goal, goes_in_rounds, with_goal
from erasediff.workflows.labelled_run import LabelledRun
from erasediff.workflows.load_model import is_text_to_image
from erasediff.workflows.prompted_run import PromptedRun
from erasediff.workflows.unlearning_run import UnlearningRun


@thread_scope()
def build_unlearning_job(
    config: Config,
    model: PixelModel | UnpromptedLatentModel | None = None,
    console: Console | None = None,
    *,
    data: ImageSet | None = None,
    rehearse: bool = False,
    out: Path | None = None,
) -> TrainingJob:
    """Build the job that unlearns what ``config`` asks for.

    Encoders are never in memory together with the denoiser, but where images of prompts are drawn: they encode images
    and prompts, which are cached, and when they have left memory, the denoiser's weights are read.

    Args:
        config: Settings that are not set take the defaults of the kind of model.
        model: A model without prompts in the place of the configuration's.
        console: Console for progress bars and notes; None for silence.
        data: Images in the place of the configuration's, such as those of ``from_torch_dataset``.
        rehearse: Build a run to be measured instead, which reads no images and writes nothing.
        out: Folder of the run, whose disk must have room for it; None checks no disk.

    Raises:
        UserError: For every mistake in checkpoint, images and settings, before anything is written but caches.
    """
    in_rounds = goes_in_rounds(config)
    run = _open(config, model, console or Console(quiet=True), data)
    check_output(run.config, run.model)
    run.set_up_denoiser()
    selected = run.selected_weights()
    model_bytes = saved_bytes(run.config, run.model)
    if out is not None:
        trains_lora = run.config.text_to_image.train == "lora"
        trained = [] if trains_lora else map(run.model.denoiser.get_parameter, selected)
        check_storage(out, run_bytes(run.config, run.config.unlearn, run.model.denoiser, trained, model_bytes))
    # Before a LoRA is added: images for prompts are the original model's.
    batches = run.batches(rehearse=rehearse)
    question = run.question(batches) if in_rounds and not rehearse else None
    if not rehearse:
        check_goal(config, question)
    run.model.release_encoders()
    if run.model.denoiser_is_meta and not loads_sharded(run.config):
        run.load_denoiser()
    conditioning = run.conditioning(batches)
    if question is not None:
        question = run.with_anchors(question)
    # With what only the run could find out, such as the anchor.
    config = with_goal(run.config, question)
    job = build_training_job(
        config,
        UnlearningModel(
            network=run.model.denoiser,
            process=run.model.process,
            predict=run.model.predict,
            save=partial(save_unlearned, config, run.model),
            saved_bytes=model_bytes,
            is_measured=run.is_measured,
            saved_as=output_name(config),
            weights=run.model.denoiser_weights if run.model.denoiser_is_meta else None,
            question=question,
            **conditioning,
        ),
        method_parameters(config, run.model.denoiser, selected),
        batches.retain,
        batches.forget,
    )
    run.model.release_encoders()
    if config.text_to_image.saliency is not None:
        assert isinstance(job.method, Solver)
        observed = map(batches.forget.at, range(config.text_to_image.saliency_batches))
        keep_to_the_salient(job.method, observed, share=config.text_to_image.saliency)
    return replace(job, lists=batches.lists)


def _open(
    config: Config, model: PixelModel | UnpromptedLatentModel | None, console: Console, data: ImageSet | None
) -> UnlearningRun:
    source = config.unlearn.model
    if model is None and source is None:
        raise UserError("There is no model to unlearn from; name one with --model.")
    if model is None and source is not None and is_text_to_image(source):
        if data is not None:
            raise UserError("A model with prompts takes its images from images.data: leave data out.")
        return PromptedRun(config, console)
    return LabelledRun(config, model, console, data)

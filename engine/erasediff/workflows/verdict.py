"""Verdict at the end of an unlearning run: what was asked, the models before and after, judges, files."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from erasediff.config import Config, SampleConfig, for_text_to_image
from erasediff.config.verdict_config import VerdictConfig
from erasediff.evaluation.diffusion_classifier import DiffusionClassifier
from erasediff.models.base import LatentModel
from erasediff.models.checkpoint_model import CheckpointModel
from erasediff.sae import ConceptEraser
from erasediff.training.job import set_up_device, thread_scope
from erasediff.training.run_dir import SINGLE_FILE
from erasediff.utils.progress import progress_bar
from erasediff.verdict.candidates import Chosen, candidates_of
from erasediff.verdict.examined import AnyModel, ExaminedModel
from erasediff.verdict.judges.base import Judge
from erasediff.verdict.judges.original import OriginalJudge
from erasediff.verdict.judges.registry import judge_named
from erasediff.verdict.recognition import (
    Drawn,
    Findings,
    concluded,
    distance_figures,
    draw,
    is_doubtful,
    judge_images,
)
from erasediff.verdict.request import Request, run_request
from erasediff.workflows.file_verdict import examine_files
from erasediff.workflows.labelled_data import for_data, open_data
from erasediff.workflows.load_model import is_text_to_image, load_checkpoint, load_unprompted
from erasediff.workflows.share_verdict import examine_shares
from erasediff.workflows.verdict_outcome import Examination, affordable_passes, undecided

FEWEST, MOST = 20, 60
"""Images of what is forgotten, and as many of what is retained, by each of the two models."""
SMALL_SIDE = 128
"""Pixels of an image of which sixteen at a time fit wherever four larger ones do."""
SEED = 1_000_003
"""Added to the run's seed: the verdict's noise is none that the run has seen."""


@thread_scope()
def examine_run(config: Config, run: Path, model: Path, console: Console, *, eraser: Path | None = None) -> Examination:
    """Examine the model of a run against the one that it was unlearned from.

    Args:
        config: Configuration of the run, complete.
        run: Folder of the run, with the lists of its images.
        model: The unlearned model.
        console: Console for progress bars.
        eraser: A concept eraser in whose presence ``model`` draws.

    Raises:
        UserError: A model, a judge or a list cannot be read.
    """
    request = _request(config, run)
    if request is None:
        return undecided("concept", "The run has no list of what it forgets.")
    device = set_up_device(config)
    before = _examined(config, config.unlearn.model, device, console)
    after = _examined(_of_result(config, before, model), model, device, console, eraser=eraser)
    if not isinstance(before.model, LatentModel) and before.model.condition == "none":
        examination = examine_shares(config, run, request, before, after, console, config.seed + SEED)
        if examination is not None:
            return examination
    if request.kind == "files":
        return examine_files(config, run, before, after, console, config.seed + SEED)
    return _examine_concepts(config, request, before, after, console)


def _request(config: Config, run: Path) -> Request | None:
    anchors = config.text_to_image.anchor_prompts
    listed = run_request(run, anchors=anchors)
    if listed is not None:
        return listed
    if config.images.forget_prompts:
        return Request.of_prompts(config.images.forget_prompts, config.images.retain_prompts, anchors=anchors)
    return None


def _of_result(config: Config, before: ExaminedModel, model: Path) -> Config:
    """Configuration to read the run's model with: the run's LoRA is in its weights, and a single file has no config."""
    changes: dict[str, Any] = {"lora": None}
    original = before.model.checkpoint.path
    if model.name == SINGLE_FILE and config.text_to_image.config is None and original.is_dir():
        changes["config"] = original
    return config.model_copy(update={"text_to_image": config.text_to_image.model_copy(update=changes)})


def _examined(
    config: Config,
    source: Path | None,
    device: torch.device,
    console: Console,
    *,
    eraser: Path | None = None,
) -> ExaminedModel:
    """The model in ``source`` with the settings to draw with."""
    assert source is not None
    sampling = config.sample
    attached: Callable[[], AbstractContextManager[object]] = nullcontext
    model: AnyModel
    if is_text_to_image(source):
        config = for_text_to_image(config)
        model = load_checkpoint(config, source, device)
        if eraser is not None:
            attached = partial(ConceptEraser.load(eraser).attached, model.denoiser)
        height, width = config.images.height, config.images.width
        size = (
            None
            if height is None and width is None
            else (height or model.default_size[0], width or model.default_size[1])
        )
        if max(size or model.default_size) <= SMALL_SIDE:
            # Four at a time, the default, would take several times as long.
            sampling = sampling.model_copy(update={"batch_size": max(sampling.batch_size, 16)})
        return ExaminedModel(model=model, settings=sampling, size=size, attached=attached)
    model = load_unprompted(source, device, console, lora_file=config.text_to_image.lora)
    if model.condition == "class":
        model = open_data(for_data(config)).fit(model, source)
    return ExaminedModel(model=model, settings=_unprompted_sampling(sampling, model))


def _unprompted_sampling(settings: SampleConfig, model: CheckpointModel) -> SampleConfig:
    if getattr(model, "space", "latent") == "latent" and "num_inference_steps" not in settings.model_fields_set:
        return settings.model_copy(update={"num_inference_steps": 30})
    return settings


def _examine_concepts(
    config: Config, request: Request, before: ExaminedModel, after: ExaminedModel, console: Console
) -> Examination:
    settings, seed = config.verdict, config.seed + SEED
    given = [judge_named(reference, before.model.device) for reference in settings.judges]
    chosen = candidates_of(request, before, _anchors(config, request, before))
    sought, retained, others = chosen.sought, chosen.retained, chosen.others
    count = settings.images or _affordable(config, before, len(sought), len(others) + len(retained))
    each = max(4, -(-count // max(len(retained), 1)))
    drawn = _drawn(before, after, chosen, count, each, seed, console)
    findings, judges = _judged(before, given, drawn, settings, seed, console)
    if settings.images is None and is_doubtful(findings[0]):
        # What chance may explain is looked at again, in thrice as many images.
        more = _drawn(before, after, chosen, 2 * count, 2 * each, seed + 1, console)
        drawn = drawn.with_more(more)
        findings, judges = _judged(before, given, drawn, settings, seed, console)
    distances = distance_figures(before, after, drawn, chosen.anchor, seed=seed)
    labels, kept = ([candidate.label for candidate in candidates] for candidates in (sought, retained))
    verdict = concluded(
        findings,
        distances,
        kind="concept",
        sought=labels,
        others=[*kept, *(candidate.label for candidate in others)],
        judges=[{"name": judge.name, **judge.description} for judge in judges],
        settings={
            "seed": seed,
            "guidance_scale": before.settings.guidance_scale,
            "num_inference_steps": before.settings.num_inference_steps,
            "images_forgotten": len(drawn.of("before", sought)),
            "images_of_each_retained": len(drawn.of("before", retained[:1])) if retained else 0,
            "prompts": {label: list(chosen.prompts[label]) for label in (*labels, *kept)},
        },
    )
    rows = [row for found in findings for row in found.rows]
    return Examination(verdict, rows, drawn.images, labels, kept)


def _drawn(
    before: ExaminedModel,
    after: ExaminedModel,
    chosen: Chosen,
    count: int,
    each: int,
    seed: int,
    console: Console,
) -> Drawn:
    """Images of both models: see ``draw``. Encoders and autoencoders leave memory."""
    of_sought = -(-count // len(chosen.sought)) * len(chosen.sought)
    with progress_bar(console, "Verdict: drawing", 2 * (of_sought + each * len(chosen.retained))) as bar:
        drawn = draw(before, after, chosen, count=count, each=each, seed=seed, progress=bar.advance)
    for examined in (before, after):
        examined.model.release_encoders()
    gc.collect()
    return drawn


def _judged(
    before: ExaminedModel, given: Sequence[Judge], drawn: Drawn, settings: VerdictConfig, seed: int, console: Console
) -> tuple[list[Findings], list[Judge]]:
    """Findings of each judge: those that were asked for, the first of which decides, and the original."""
    model = before.model
    classifier = DiffusionClassifier(
        model.denoiser, model.process, model.predict, seed=seed, batch_size=before.settings.batch_size
    )
    images = sum(len(of_one) for of_model in drawn.images.values() for of_one in of_model.values())
    candidates = len(drawn.sought) + len(drawn.retained) + len(drawn.others)
    with progress_bar(console, "Verdict: judging", classifier.passes(images, candidates)) as bar:
        judges: list[Judge] = [*given, OriginalJudge(model, classifier, bar.advance)]
        findings = [judge_images(judge, drawn, settings, decides=not number) for number, judge in enumerate(judges)]
    return findings, judges


def _anchors(config: Config, request: Request, before: ExaminedModel) -> tuple[str, ...]:
    """Captions that the forgotten concepts were to become, or the names of the classes that they were relabelled to."""
    if isinstance(before.model, LatentModel):
        return request.anchors
    names, relabelled = before.model.class_names, config.unlearn.relabel_to or ()
    return tuple(names[number] for number in relabelled if isinstance(number, int))


def _affordable(config: Config, before: ExaminedModel, sought: int, others: int) -> int:
    """Images of each side that take a quarter of the run's time, between ``FEWEST`` and ``MOST``."""
    candidates = sought + others
    of_image = 2 * (2 * before.settings.num_inference_steps + 2 * candidates + 4 * min(candidates, 4) + 16)
    return int(min(max(affordable_passes(config) / (2 * of_image), FEWEST), MOST))

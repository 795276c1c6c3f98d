"""Verdict on an unconditional model: samples, a judge fitted to the run's images, files for readers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from erasediff.config import Config
from erasediff.evaluation.denoiser_features import DenoiserFeatures
from erasediff.utils.progress import progress_bar
from erasediff.verdict.examined import ExaminedModel
from erasediff.verdict.judges.base import Candidate, Judge
from erasediff.verdict.judges.feature_judge import FeatureJudge
from erasediff.verdict.judges.original import samples_of
from erasediff.verdict.judges.registry import judge_named
from erasediff.verdict.recognition import AFTER, BEFORE, concluded
from erasediff.verdict.request import Request
from erasediff.verdict.shares import RECOGNISED, HeldOut, SampledShares, grouped, judge_shares
from erasediff.workflows.verdict_images import RealImages, run_images, size_of
from erasediff.workflows.verdict_outcome import Examination, affordable_passes, undecided

FEWEST, MOST = 200, 500
"""Samples of each model."""
FORGOTTEN, RETAINED = 500, 1500
"""Images that the judge is fitted to and tested on, at most."""
LEAST = 20
"""Images of either side that a judge is fitted to, at least."""
TEST_EVERY = 5
MOST_CLASSES = 12
"""Retained classes that are told apart, the most frequent; images of others are of ``OTHERS``."""
THE_FORGOTTEN, OTHERS = "what is forgotten", "the rest"


def examine_shares(
    config: Config,
    run: Path,
    request: Request,
    before: ExaminedModel,
    after: ExaminedModel,
    console: Console,
    seed: int,
) -> Examination | None:
    """Examine an unconditional model by the share of its samples that show what is forgotten.

    Returns:
        None for listed files that are no class of images: a judge cannot tell them from those that are retained.
    """
    forget, retain = run_images(config, run, size_of(before), forgotten=FORGOTTEN, retained=RETAINED)
    sought = [concept.label for concept in request.sought] if request.kind == "concept" else [THE_FORGOTTEN]
    if request.kind == "concept":
        forget = forget.at([number for number, label in enumerate(forget.labels) if label in sought])
    if min(len(forget), len(retain)) < LEAST:
        return None if request.kind == "files" else undecided("share", _too_few(len(forget), len(retain)))
    kept = [concept.label for concept in request.retained[:MOST_CLASSES]]
    names = [*sought, *kept, *([OTHERS] if set(retain.labels) - set(kept) else [])]
    forget_labels = list(forget.labels) if request.kind == "concept" else [THE_FORGOTTEN] * len(forget)
    retain_labels = [label if label in kept else OTHERS for label in retain.labels]
    features = DenoiserFeatures(
        before.model.denoiser,
        before.model.process,
        before.model.predict,
        {},
        batch_size=before.settings.batch_size,
        seed=seed,
    )
    held_out = HeldOut(*(images.pixels[::TEST_EVERY] for images in (forget, retain)))
    judge = _fitted(before, features, (forget, retain), (forget_labels, retain_labels), names)
    candidates = [Candidate(name, name) for name in names]
    if request.kind == "files" and not _tells_apart(judge, held_out, candidates):
        return None
    count = config.verdict.images or _affordable(config, before)
    nothing = Candidate("", "")
    with progress_bar(console, "Verdict: drawing", 2 * count) as bar:
        images = {
            name: model.draw(nothing, count, seed, bar.advance).expand(-1, 3, -1, -1)
            for name, model in ((BEFORE, before), (AFTER, after))
        }
    sampled = SampledShares(candidates[: len(sought)], candidates[len(sought) :], images, held_out)
    # Those that were asked for come first, and decide.
    judges: list[Judge] = [*(judge_named(name, before.model.device) for name in config.verdict.judges), judge]
    with console.status("Verdict: judging"):
        findings = [judge_shares(one, sampled, config.verdict, decides=not number) for number, one in enumerate(judges)]
    verdict = concluded(
        findings,
        [],
        kind="share",
        sought=sought,
        others=names[len(sought) :],
        judges=[{"name": one.name, **one.description} for one in judges],
        settings={"seed": seed, "num_inference_steps": before.settings.num_inference_steps, "images": count},
    )
    rows = [row for found in findings for row in found.rows]
    pictures, forgotten, retained = grouped(sampled, rows)
    return Examination(verdict, rows, pictures, forgotten, retained)


def _too_few(forgotten: int, retained: int) -> str:
    return (
        f"The run has seen {forgotten} images to forget and {retained} to retain that are still there, and a judge is "
        f"fitted to {LEAST} of each at least."
    )


def _fitted(
    before: ExaminedModel,
    features: DenoiserFeatures,
    real: Sequence[RealImages],
    labels: Sequence[Sequence[str]],
    names: Sequence[str],
) -> FeatureJudge:
    def extract(images: Tensor) -> Tensor:
        return features.of(samples_of(before.model, images, batch_size=before.settings.batch_size))

    fitted = [[number for number in range(len(images)) if number % TEST_EVERY] for images in real]
    pixels = torch.cat([images.pixels[numbers] for images, numbers in zip(real, fitted, strict=True)])
    classes = [names.index(of[number]) for of, numbers in zip(labels, fitted, strict=True) for number in numbers]
    return FeatureJudge(extract, pixels, torch.tensor(classes), names, before.model.denoiser_hash())


def _tells_apart(judge: Judge, held_out: HeldOut, candidates: Sequence[Candidate]) -> bool:
    found, mistaken = (
        float((judge.answers(images, candidates[:1], candidates[1:]) == 0).double().mean())
        for images in (held_out.sought, held_out.others)
    )
    return found >= RECOGNISED and mistaken <= 1 - RECOGNISED


def _affordable(config: Config, before: ExaminedModel) -> int:
    """Samples of each model that take a quarter of the run's time, between ``FEWEST`` and ``MOST``."""
    return int(min(max(affordable_passes(config) / (2 * before.settings.num_inference_steps), FEWEST), MOST))

"""Verdict on listed images: draws of their captions, classes or none, and losses of both models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from erasediff.config import Config
from erasediff.evaluation.denoiser_features import DenoiserFeatures
from erasediff.evaluation.memorization import image_losses
from erasediff.models.base import LatentModel
from erasediff.utils.progress import progress_bar
from erasediff.verdict.examined import ExaminedModel
from erasediff.verdict.files import FORGOTTEN, RETAINED, UNSEEN, FileEvidence, judge_files, reproduced
from erasediff.verdict.judges.base import Candidate
from erasediff.verdict.judges.original import samples_of
from erasediff.verdict.recognition import AFTER, BEFORE, concluded
from erasediff.workflows.verdict_images import RealImages, run_images, size_of, unseen_images
from erasediff.workflows.verdict_outcome import Examination, affordable_passes, undecided

MOST_ASKED = 20
"""Captions or classes of images to forget that images are drawn of."""
FEWEST_EACH, MOST_EACH = 4, 16
"""Images that are drawn of each."""
UNASKED = "samples"
"""Label of the samples of an unconditional model."""
FEWEST_LOSSES, MOST_LOSSES, LOSS_DRAWS = 32, 200, 10
COMPARED = 500
"""Retained images among which a drawn image is looked for."""


def examine_files(
    config: Config, run: Path, before: ExaminedModel, after: ExaminedModel, console: Console, seed: int
) -> Examination:
    """Examine a model that was to forget listed images, of captions or classes that it retains.

    Raises:
        UserError: The unseen images cannot be read.
    """
    size, quarter = size_of(before), affordable_passes(config) / 4
    most = int(min(max(quarter / (3 * LOSS_DRAWS), FEWEST_LOSSES), MOST_LOSSES))
    forget, retain = run_images(config, run, size, forgotten=MOST_LOSSES, retained=COMPARED)
    if not len(forget) or not len(retain):
        return undecided("files", "No image that the run has seen is still there to compare with.")
    unseen = None if config.verdict.unseen_data is None else unseen_images(config, before, most)
    forget, retain, *others = _distinct(*(images for images in (forget, retain, unseen) if images is not None))
    asks = [""] if _is_unconditional(before) else list(dict.fromkeys(forget.asks))[:MOST_ASKED]
    each = _draws_of_each(config, before, len(asks), quarter)
    with progress_bar(console, "Verdict: drawing", 2 * each * len(asks)) as bar:
        images = {
            name: {ask or UNASKED: _draw(model, ask, each, seed, bar.advance) for ask in asks}
            for name, model in ((BEFORE, before), (AFTER, after))
        }
    found = _reproduced(before, forget, retain, images, seed)
    sets = {FORGOTTEN: _some(forget, most), RETAINED: _some(retain, most)}
    if others and len(others[0]):
        sets[UNSEEN] = others[0]
    count = 2 * LOSS_DRAWS * sum(map(len, sets.values()))
    with progress_bar(console, "Verdict: losses", count) as bar:
        losses = {
            name: {of: _losses(model, real, seed, bar.advance) for of, real in sets.items()}
            for name, model in ((BEFORE, before), (AFTER, after))
        }
    names = {of: real.names for of, real in sets.items()}
    evidence = FileEvidence(found, [ask for ask in asks for _ in range(each)], forget.names, losses, names)
    findings = judge_files(evidence, config.verdict)
    verdict = concluded(
        [findings],
        [],
        kind="files",
        sought=(f"{len(forget)} listed images",),
        settings={
            "seed": seed,
            "num_inference_steps": before.settings.num_inference_steps,
            "guidance_scale": before.settings.guidance_scale,
            "draws_of_each": each,
            "draws_of_a_loss": LOSS_DRAWS,
            "images": {of: len(real) for of, real in sets.items()},
            "unseen_data": config.verdict.unseen_data,
        },
    )
    return Examination(verdict, findings.rows, images, [ask or UNASKED for ask in asks])


def _draws_of_each(config: Config, before: ExaminedModel, asks: int, passes: float) -> int:
    if config.verdict.images is not None:
        return max(-(-config.verdict.images // asks), 1)
    each = passes / (2 * 2 * before.settings.num_inference_steps * asks)
    # Of an unconditional model, all samples are of one kind.
    return int(min(max(each, FEWEST_EACH), MOST_EACH)) * (MOST_ASKED // asks if asks == 1 else 1)


def _candidate(examined: ExaminedModel, ask: str) -> Candidate:
    """The candidate of a caption or class; of no condition for an unconditional model."""
    return Candidate("", "") if _is_unconditional(examined) else examined.candidate(ask)


def _is_unconditional(examined: ExaminedModel) -> bool:
    return not isinstance(examined.model, LatentModel) and examined.model.condition == "none"


def _draw(examined: ExaminedModel, ask: str, count: int, seed: int, progress: Callable[[int], None]) -> Tensor:
    return examined.draw(_candidate(examined, ask), count, seed, progress).expand(-1, 3, -1, -1)


def _reproduced(
    before: ExaminedModel,
    forget: RealImages,
    retain: RealImages,
    images: Mapping[str, Mapping[str, Tensor]],
    seed: int,
) -> dict[str, Tensor]:
    """By model, the image to forget that each drawn one reproduces, in pixels and in features of the original."""
    condition = _candidate(before, "").condition if isinstance(before.model, LatentModel) else _null(before)
    features = DenoiserFeatures(
        before.model.denoiser,
        before.model.process,
        before.model.predict,
        condition,
        batch_size=before.settings.batch_size,
        seed=seed,
    )

    def views(pixels: Tensor) -> list[Tensor]:
        return [pixels.float(), features.of(samples_of(before.model, pixels))]

    training, count = views(torch.cat([forget.pixels, retain.pixels])), len(forget)
    return {name: reproduced(views(torch.cat(list(drawn.values()))), training, count) for name, drawn in images.items()}


def _null(before: ExaminedModel) -> Mapping[str, Tensor]:
    """Condition of images whose class is not told; that of the first class for a model without a null label."""
    if _is_unconditional(before):
        return {}
    model = before.model
    assert not isinstance(model, LatentModel)
    return {"class_labels": torch.tensor([model.null_label or 0])}


def _distinct(*sets: RealImages) -> list[RealImages]:
    """``sets`` without copies of earlier images: training images must differ for one of them to be reproduced."""
    seen: set[bytes] = set()
    distinct = []
    for images in sets:
        numbers = []
        for number, pixels in enumerate(images.pixels):
            content = pixels.numpy().tobytes()
            if content not in seen:
                seen.add(content)
                numbers.append(number)
        distinct.append(images.at(numbers))
    return distinct


def _some(images: RealImages, most: int) -> RealImages:
    count = min(most, len(images))
    return images.at([number * len(images) // count for number in range(count)])


def _losses(examined: ExaminedModel, real: RealImages, seed: int, progress: Callable[[int], None]) -> Tensor:
    """Denoising loss float32 [N] of each image under what it is asked for."""
    model = examined.model
    conditions = {ask: _candidate(examined, ask).condition for ask in dict.fromkeys(real.asks)}
    samples = samples_of(model, real.pixels)
    dtype = next(model.denoiser.parameters()).dtype
    parts = []
    with examined.attached():
        for numbers in torch.split(torch.arange(len(samples)), examined.settings.batch_size):
            told = _stacked([conditions[real.asks[number]] for number in numbers.tolist()], model.device, dtype)
            batch = {"sample": samples[numbers].to(model.device, dtype), "sample_ids": numbers.to(model.device), **told}
            parts.append(
                image_losses(
                    model.denoiser, batch, process=model.process, denoiser=model.predict, draws=LOSS_DRAWS, seed=seed
                )
            )
            progress(LOSS_DRAWS * len(numbers))
    return torch.cat(parts)


def _stacked(conditions: Sequence[Mapping[str, Tensor]], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: torch.cat([condition[name] for condition in conditions]).to(
            device, dtype if first.is_floating_point() else first.dtype
        )
        for name, first in conditions[0].items()
    }

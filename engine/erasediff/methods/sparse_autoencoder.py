"""SAEmnesia: a sparse autoencoder at one block erases concepts of prompts; the model's weights stay as they are."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from rich.console import Console

from erasediff.config import Config
from erasediff.config.fields import Count, Fraction, NonNegative, Positive, Section
from erasediff.errors import UserError
from erasediff.io.atomic import check_new
from erasediff.io.cache_dir import cache_folder
from erasediff.methods.spec import MethodSpec, Requirements, RunContext
from erasediff.models.base import LatentModel
from erasediff.sae import (
    ActivationCache,
    ConceptEraser,
    SaeTraining,
    SparseAutoencoder,
    Supervision,
    assign_latents,
    collect_activations,
    measure_features,
    train_autoencoder,
)
from erasediff.sae.concepts import calibrate, measure_maps
from erasediff.sae.eraser import sample_bank
from erasediff.sae.hooks import block_of
from erasediff.utils.progress import progress_bar

ERASER = "saemnesia"
"""Name of the eraser's folder in a run's folder."""
HELD_OUT = 1 << 20
"""Added to the seed of images that nothing is trained on."""

Template = Annotated[str, Field(pattern=r"\{\}")]


class SaemnesiaConfig(Section):
    """Settings of SAEmnesia: a sparse autoencoder at one block of the denoiser.

    Attributes:
        block: whose output is edited; objects' block in Stable Diffusion 1.5 by default.
        templates: prompts with {} where a concept's name goes; its images take turns.
        images_per_prompt: images of each prompt, in ``num_inference_steps`` with ``guidance_scale``.
        crossed: concepts and thresholds are learned under other images' prompts too (``collect_activations``).
        held_out: further images of each prompt: thresholds are calibrated on them, and detection is measured.
        false_positives: share of other concepts' patches, or images, that a threshold may let through at a timestep.
        num_inference_steps: sampling steps of these images.
        guidance_scale: classifier-free guidance of these images.
        expansion: latents per input dimension, n / d.
        k: active latents per patch.
        epochs: of the unsupervised stage.
        lr: of the unsupervised stage.
        supervised_epochs: of the second stage.
        supervised_lr: of the second stage.
        batch_size: patches in a step.
        dead_after: patches after which a latent that was not active counts as dead.
        weight: of the second stage's supervision, as in ``Supervision``; ours, since none is published.
        decorrelation: likewise.
        sparsity: likewise.
        detection: as in ``ConceptEraser``; "published" is the paper's.
        intervention: likewise. "move" replaces a concept by text_to_image.anchor_prompts, or the nearest concept.
        strength: as in ``ConceptEraser``.
        distance: as in ``ConceptEraser``.
        bank: patches kept per timestep for "replace".
        eraser: sampling: the folder of an eraser to attach; unlearning: one whose latents are used again, so that
            the prompts to forget, which it must know, are erased besides what it erases.
    """

    block: str = "up_blocks.1.attentions.1"
    templates: Annotated[tuple[Template, ...], Field(min_length=1)] = ("{}",)
    images_per_prompt: Count = 80
    crossed: bool = True
    held_out: Count = 20
    false_positives: Fraction = 0.05
    num_inference_steps: Count = 50
    guidance_scale: NonNegative = 9.0
    expansion: Count = 16
    k: Annotated[int, Field(gt=0, le=1024)] = 32
    epochs: Count = 5
    lr: Positive = 4e-4
    supervised_epochs: Count = 5
    supervised_lr: Positive = 5e-6
    batch_size: Count = 4096
    dead_after: Count = 10_000_000
    weight: NonNegative = 10.0
    decorrelation: NonNegative = 0.1
    sparsity: NonNegative = 1e-5
    detection: Literal["published", "patch", "image"] = "image"
    intervention: Literal["published", "steer", "replace", "move"] = "move"
    strength: float = -1.0
    distance: Positive = 1.5
    bank: Count = 256
    eraser: Path | None = None


def run(context: RunContext) -> dict[str, Any]:
    """Write OUT/saemnesia, which ``ConceptEraser.load`` reads; returns what is reported of it.

    Activations come from the cache where they are there, and training goes on from OUT/training where a killed run left
    its state. Each prompt to forget and each prompt to retain is a concept with a latent of its own. With
    ``saemnesia.eraser`` nothing is trained: the latents that it has serve for more prompts to forget.

    Raises:
        UserError: for missing prompts, a checkpoint or block that cannot be used, and an OUT/saemnesia that exists.
    """
    began = time.perf_counter()
    config, out = context.config, context.out
    settings, forgotten, retained = config.section(SaemnesiaConfig), *_prompts(config)
    check_new(out / ERASER)
    if settings.eraser is None:
        eraser, measured = _made(context, forgotten, retained)
    else:
        eraser, measured = _extended(config, ConceptEraser.load(settings.eraser), forgotten), {}
    eraser.save(out / ERASER)
    shutil.rmtree(out / "training", ignore_errors=True)
    counts = {"concepts": len(eraser.concepts), "erased": len(eraser.erased)}
    return {"eraser": str(out / ERASER), **counts, **measured, "seconds": time.perf_counter() - began}


def _prompts(config: Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(prompts to forget, prompts to retain). UserError without them, unless an eraser knows its concepts already."""
    forgotten, retained = config.images.forget_prompts, config.images.retain_prompts
    if config.section(SaemnesiaConfig).eraser is None and not (forgotten and retained):
        raise UserError("saemnesia learns to tell concepts apart; give both --forget-prompts and --retain-prompts.")
    return forgotten, retained


def _extended(config: Config, eraser: ConceptEraser, forgotten: Sequence[str]) -> ConceptEraser:
    settings = config.section(SaemnesiaConfig)
    before = [eraser.concepts[number] for number in eraser.erased]
    return replace(
        eraser.erasing([*before, *forgotten], config.text_to_image.anchor_prompts),
        detection=settings.detection,
        intervention=settings.intervention,
        strength=settings.strength,
        distance=settings.distance,
    )


def _made(
    context: RunContext, forgotten: Sequence[str], retained: Sequence[str]
) -> tuple[ConceptEraser, dict[str, Any]]:
    """The eraser after both trainings, and what is reported of it."""
    config, out, console = context.config, context.out, context.console
    settings = config.section(SaemnesiaConfig)
    model = context.load_model()
    block_of(model.denoiser, settings.block)
    # In an order that does not depend on which are forgotten: their activations then serve for others, too.
    concepts = tuple(sorted({*forgotten, *retained}))
    if settings.crossed and config.images.encode_batch_size == 1:
        raise UserError("saemnesia.crossed swaps prompts within a batch; set images.encode_batch_size to 2 or more.")
    cache = _activations(config, model, concepts, settings.images_per_prompt, config.seed, console)
    held_out = _activations(config, model, concepts, settings.held_out, config.seed + HELD_OUT, console)
    autoencoder, measured = _trained(config, cache, len(concepts), model.device, out, console)
    assigned = measured.pop("assigned")
    features = measure_features(autoencoder, cache, len(assigned))
    thresholds, patches, images = calibrate(
        autoencoder, assigned, _supervising(config, held_out), features.timesteps, settings.false_positives
    )
    bank, bank_concepts, limit = sample_bank(autoencoder, cache, features.timesteps, settings.bank)
    eraser = ConceptEraser(
        autoencoder=autoencoder,
        block=settings.block,
        concepts=concepts,
        assigned=assigned,
        erased=(),
        anchors=(),
        features=features,
        thresholds=thresholds,
        bank=bank,
        bank_concepts=bank_concepts,
        maps=measure_maps(cache, features.timesteps, len(concepts)),
        limit=limit,
        detection=settings.detection,
        intervention=settings.intervention,
        strength=settings.strength,
        distance=settings.distance,
    ).erasing(forgotten, config.text_to_image.anchor_prompts)
    measured["detection"] = {
        name: {"patch": patches.of(number), "image": images.of(number)}
        for name, number in zip(forgotten, eraser.erased, strict=True)
    }
    return eraser, measured


def _supervising(config: Config, cache: ActivationCache) -> ActivationCache:
    return cache.with_crossed() if config.section(SaemnesiaConfig).crossed else cache


def _activations(
    config: Config, model: LatentModel, concepts: Sequence[str], images: int, seed: int, console: Console
) -> ActivationCache:
    settings = config.section(SaemnesiaConfig)
    with progress_bar(console, "Activations", len(concepts) * images) as bar:
        return collect_activations(
            model,
            settings.block,
            [[template.replace("{}", concept) for template in settings.templates] for concept in concepts],
            cache_folder() / "activations",
            images_per_concept=images,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            crossed=settings.crossed,
            seed=seed,
            batch_size=config.images.encode_batch_size,
            progress=bar.advance,
        )


def _trained(
    config: Config, cache: ActivationCache, concepts: int, device: torch.device, out: Path, console: Console
) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """The autoencoder after both stages, and what is reported of it, the latents assigned included."""
    settings = config.section(SaemnesiaConfig)
    dim = cache.read(0).x.shape[1]
    autoencoder = SparseAutoencoder(dim, settings.expansion * dim, settings.k, config.seed).to(device)
    first = SaeTraining(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        lr=settings.lr,
        dead_after=settings.dead_after,
        seed=config.seed,
    )
    second = SaeTraining(
        epochs=settings.supervised_epochs,
        batch_size=settings.batch_size,
        lr=settings.supervised_lr,
        dead_after=settings.dead_after,
        seed=config.seed + 1,
    )
    if cache.batch_count(settings.batch_size, 1) == 0:
        raise UserError(f"There are not {settings.batch_size} patches in a shard: set a smaller saemnesia.batch_size.")
    training = out / "training"
    training.mkdir(parents=True, exist_ok=True)
    with progress_bar(console, "Autoencoder", cache.batch_count(first.batch_size, first.epochs)) as bar:
        unsupervised = train_autoencoder(
            autoencoder, cache, first, checkpoint=training / "first.safetensors", progress=bar.advance
        )
    assigned = assign_latents(measure_features(autoencoder, cache, concepts))
    supervision = Supervision(
        assigned=assigned.to(device),
        per_image=settings.detection == "image",
        weight=settings.weight,
        decorrelation=settings.decorrelation,
        sparsity=settings.sparsity,
    )
    supervising = _supervising(config, cache)
    with progress_bar(console, "Concepts", supervising.batch_count(second.batch_size, second.epochs)) as bar:
        measured = train_autoencoder(
            autoencoder,
            supervising,
            second,
            supervision=supervision,
            checkpoint=training / "second.safetensors",
            progress=bar.advance,
        )
    autoencoder.requires_grad_(False)
    return autoencoder, {"fvu": unsupervised["fvu"], "fvu_supervised": measured["fvu"], "assigned": assigned}


SPEC = MethodSpec(
    name="saemnesia",
    summary="concept latents of a sparse autoencoder, edited while sampling (SAEmnesia)",
    config=SaemnesiaConfig,
    reads=lambda _: {"model", "method"},
    needs=lambda _: Requirements(retain=False, forget=False),
    run=run,
    single_process_reason="its autoencoder is trained on one device",
)

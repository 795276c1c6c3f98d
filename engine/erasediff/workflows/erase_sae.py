"""Erase the concepts of prompts from a text-to-image model with a sparse autoencoder; its weights stay as they are."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from erasediff.config import Config, for_text_to_image
from erasediff.errors import UserError
from erasediff.io.atomic import atomic_write, check_new
from erasediff.io.cache_dir import cache_folder
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
from erasediff.training.job import set_up_device
from erasediff.training.run_dir import ERASER, RunPlace
from erasediff.utils.progress import progress_bar
from erasediff.workflows.load_model import load_checkpoint

HELD_OUT = 1 << 20
"""Added to the seed of images that nothing is trained on."""


def erase_with_autoencoder(config: Config, out: Path, console: Console) -> dict[str, Any]:
    """Write OUT/saemnesia, which ``ConceptEraser.load`` reads, and the configuration; returns what is reported of it.

    Activations come from the cache where they are there, and training goes on from OUT/training where a killed run left
    its state. Each prompt to forget and each prompt to retain is a concept with a latent of its own. With
    ``config.saemnesia.eraser`` nothing is trained: the latents that it has serve for more prompts to forget. UserError
    for missing prompts, a checkpoint or block that cannot be used, and an OUT/saemnesia that exists.
    """
    began = time.perf_counter()
    config = for_text_to_image(config)
    forgotten, retained = config.images.forget_prompts, config.images.retain_prompts
    if config.unlearn.model is None:
        raise UserError("Say with --model which model to unlearn from.")
    if config.saemnesia.eraser is None and not (forgotten and retained):
        raise UserError("saemnesia tells concepts apart: give --forget-prompts and --retain-prompts.")
    check_new(out / ERASER)
    if config.saemnesia.eraser is None:
        eraser, measured = _made(config, forgotten, retained, out, console)
    else:
        eraser, measured = _extended(config, ConceptEraser.load(config.saemnesia.eraser), forgotten), {}
    eraser.save(out / ERASER)
    atomic_write(out / "config.yaml", config.to_yaml())
    shutil.rmtree(out / "training", ignore_errors=True)
    counts = {"concepts": len(eraser.concepts), "erased": len(eraser.erased)}
    return {"eraser": str(out / ERASER), **counts, **measured, "seconds": time.perf_counter() - began}


def _extended(config: Config, eraser: ConceptEraser, forgotten: Sequence[str]) -> ConceptEraser:
    settings = config.saemnesia
    before = [eraser.concepts[number] for number in eraser.erased]
    return replace(
        eraser.erasing([*before, *forgotten], config.text_to_image.anchor_prompts),
        detection=settings.detection,
        intervention=settings.intervention,
        strength=settings.strength,
        distance=settings.distance,
    )


def _made(
    config: Config, forgotten: Sequence[str], retained: Sequence[str], out: Path, console: Console
) -> tuple[ConceptEraser, dict[str, Any]]:
    """The eraser after both trainings, and what is reported of it."""
    settings = config.saemnesia
    assert config.unlearn.model is not None
    model = load_checkpoint(config, config.unlearn.model, set_up_device(config))
    block_of(model.denoiser, settings.block)
    # In an order that does not depend on which are forgotten: their activations then serve for others, too.
    concepts = tuple(sorted({*forgotten, *retained}))
    if settings.crossed and config.images.encode_batch_size == 1:
        raise UserError("Prompts change places within a batch: set images.encode_batch_size to 2 or more.")
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
    return cache.with_crossed() if config.saemnesia.crossed else cache


def _activations(
    config: Config, model: LatentModel, concepts: Sequence[str], images: int, seed: int, console: Console
) -> ActivationCache:
    settings = config.saemnesia
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
    settings = config.saemnesia
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
        whole=settings.detection == "image",
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


def erase_at(place: RunPlace | None, config: Config, console: Console) -> dict[str, Any]:
    """``erase_with_autoencoder`` in the folder of ``place``. UserError for a dry run, and for one to be resumed."""
    if place is None:
        raise UserError("saemnesia trains no weight of the model, so there is no step to plan: omit --dry-run.")
    if place.resuming:
        raise UserError("saemnesia goes on by itself from what a killed run left in --out: omit --resume.")
    return erase_with_autoencoder(config, place.path, console)


@contextmanager
def erasing(config: Config, model: LatentModel) -> Iterator[None]:
    """Within the block ``model`` samples without the concepts of ``config.saemnesia.eraser``, where there is one."""
    if config.saemnesia.eraser is None:
        yield
        return
    with ConceptEraser.load(config.saemnesia.eraser).attached(model.denoiser):
        yield

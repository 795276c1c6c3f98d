"""Autoencoders and erasers of planted concepts and of the nano Stable Diffusion, for the tests of this folder."""

import dataclasses
from pathlib import Path

from erasediff.models.base import LatentModel
from erasediff.sae import (
    ActivationCache,
    ConceptEraser,
    SaeTraining,
    SparseAutoencoder,
    assign_latents,
    collect_activations,
    measure_features,
    train_autoencoder,
)
from erasediff.sae.concepts import calibrate, measure_maps
from erasediff.sae.eraser import sample_bank

BLOCK = "up_blocks.1.attentions.0"
PROMPTS = ["a cat", "a dog", "a sofa"]
SETTINGS = SaeTraining(epochs=6, batch_size=64, lr=3e-3, dead_after=500, checkpoint_every=5)


def trained(cache: ActivationCache, epochs: int = 6, checkpoint: Path | None = None) -> SparseAutoencoder:
    autoencoder = SparseAutoencoder(16, 48, 6, seed=3)
    train_autoencoder(autoencoder, cache, dataclasses.replace(SETTINGS, epochs=epochs), checkpoint=checkpoint)
    return autoencoder


def eraser_of(autoencoder: SparseAutoencoder, cache: ActivationCache, block: str = BLOCK) -> ConceptEraser:
    features = measure_features(autoencoder, cache, 3)
    assigned = assign_latents(features)
    bank, bank_concepts, limit = sample_bank(autoencoder, cache, features.timesteps, 96)
    return ConceptEraser(
        autoencoder=autoencoder.requires_grad_(False),
        block=block,
        concepts=tuple(PROMPTS),
        assigned=assigned,
        erased=(),
        anchors=(),
        features=features,
        thresholds=calibrate(autoencoder, assigned, cache, features.timesteps)[0],
        bank=bank,
        bank_concepts=bank_concepts,
        maps=measure_maps(cache, features.timesteps, 3),
        limit=limit,
    ).erasing(PROMPTS[:1])


def cache_of(
    model: LatentModel, folder: Path, guidance: float = 3.0, batch_size: int = 4, crossed: bool = False
) -> ActivationCache:
    return collect_activations(
        model,
        BLOCK,
        [[prompt, f"a photo of {prompt}"] for prompt in PROMPTS],
        folder,
        images_per_concept=2,
        num_inference_steps=3,
        guidance_scale=guidance,
        batch_size=batch_size,
        crossed=crossed,
    )

"""Sparse autoencoders of a block's activations, and concepts taken out of a diffusion model through them."""

from erasediff.sae.activations import ActivationCache, collect_activations
from erasediff.sae.autoencoder import SparseAutoencoder
from erasediff.sae.concepts import (
    Features,
    MeanMaps,
    Thresholds,
    assign_latents,
    calibrate,
    measure_features,
    measure_maps,
)
from erasediff.sae.eraser import ConceptEraser
from erasediff.sae.training import SaeTraining, Supervision, train_autoencoder

__all__ = [
    "ActivationCache",
    "ConceptEraser",
    "Features",
    "MeanMaps",
    "SaeTraining",
    "SparseAutoencoder",
    "Supervision",
    "Thresholds",
    "assign_latents",
    "calibrate",
    "collect_activations",
    "measure_features",
    "measure_maps",
    "train_autoencoder",
]

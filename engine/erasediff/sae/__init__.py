"""Sparse autoencoders of a block's activations, and concepts taken out of a diffusion model through them."""

from erasediff.sae.activations import ActivationCache, collect_activations
from erasediff.sae.autoencoder import SparseAutoencoder
from erasediff.sae.eraser import ConceptEraser
from erasediff.sae.features import Features, assign_latents, measure_features
from erasediff.sae.training import SaeTraining, Supervision, train_autoencoder

__all__ = [
    "ActivationCache",
    "ConceptEraser",
    "Features",
    "SaeTraining",
    "SparseAutoencoder",
    "Supervision",
    "assign_latents",
    "collect_activations",
    "measure_features",
    "train_autoencoder",
]

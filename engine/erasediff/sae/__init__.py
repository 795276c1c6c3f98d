"""Sparse autoencoders of a block's activations, and concepts taken out of a diffusion model through them."""

from erasediff.sae.activations import ActivationCache, collect_activations
from erasediff.sae.autoencoder import SparseAutoencoder
from erasediff.sae.detection import Thresholds, calibrate
from erasediff.sae.eraser import ConceptEraser
from erasediff.sae.features import Features, assign_latents, measure_features
from erasediff.sae.maps import MeanMaps, measure_maps
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

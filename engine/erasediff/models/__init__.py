"""Models that the engine builds, loads and saves in diffusers' format."""

from erasediff.models.ema import ema_weights
from erasediff.models.pixel import PixelModel

__all__ = ["PixelModel", "ema_weights"]

"""Models that the engine builds, loads and saves in diffusers' format."""

from erasediff.models.pixel_unet import PixelModel

__all__ = ["PixelModel"]

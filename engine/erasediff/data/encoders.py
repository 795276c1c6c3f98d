"""Interfaces of the encoders that the cache is filled by."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class ImageEncoder(Protocol):
    """What makes the samples of a model of images."""

    @property
    def hash(self) -> str:
        """Hash of the weights of all encoders."""

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Latents [B, C, h, w], scaled for the denoiser, from float32 [B, 3, H, W] in [-1, 1]; deterministic.

        Where samples are images themselves, uint8 stands for [-1, 1] in steps of 1/127.5.
        """


class PromptEncoder(Protocol):
    """The text encoders of a model."""

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Condition tensors, one row per prompt."""


class Encoders(ImageEncoder, PromptEncoder, Protocol):
    """The encoders of a text-to-image model."""

    def size_condition(
        self, original_size: tuple[int, int], crop: tuple[int, int], target_size: tuple[int, int], count: int
    ) -> dict[str, Tensor]:
        """Condition tensors of ``count`` rows; sizes are (height, width), ``crop`` is (top, left)."""

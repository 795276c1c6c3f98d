"""Interface of a diffusion model: a denoiser, a process, a space and a kind of condition."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol, Self

import torch
from torch import Tensor, nn

from erasediff.diffusion.batch import Batch
from erasediff.diffusion.noise_schedule import Process

Space = Literal["pixel", "latent"]
"""Of a model's samples: images themselves, or latents of an autoencoder."""
Condition = Literal["none", "class", "text"]
"""What a denoiser is told besides the timestep: nothing, a class label, or prompts."""


class UnpromptedModel(Protocol):
    """A model without prompts: unconditional, or conditioned on class labels, in pixels or in latents.

    ``LatentModel`` has the same members for models with prompts. A batch of an unprompted model has the entries
    ``"sample"`` and, if it is conditioned on classes, ``"class_labels"``.
    """

    @property
    def space(self) -> Space: ...

    @property
    def condition(self) -> Condition: ...

    @property
    def num_classes(self) -> int | None:
        """Number of classes, the null label not counted; None for an unconditional model."""

    @property
    def null_label(self) -> int | None:
        """Label of no class, for classifier-free guidance; None for a model without."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class; () for an unconditional model."""

    @property
    def denoiser(self) -> nn.Module: ...

    @property
    def process(self) -> Process: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image in pixels."""

    @property
    def hash(self) -> str:
        """Hash of all that ``encode_images`` depends on."""

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Samples [B, ...] to be cached, of float32 pixels [B, 3, H, W] in [-1, 1].

        uint8 stands for [-1, 1] in steps of 1/127.5, which ``CachedBatches`` undoes.
        """

    def predict(self, model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor:
        """The prediction of ``model``, this denoiser or a copy of it; a ``diffusion.batch.Denoiser``."""

    def described_by(self, class_names: tuple[str, ...]) -> Self:
        """This model with the class names of a data set. UserError if the model has another number of classes."""

    def to(self, device: torch.device | str) -> Self:
        """Move the denoiser's weights; return this same model."""

    def save(self, path: Path, *, replace: bool = False) -> None:
        """Write a diffusers folder, atomically. UserError if ``path`` exists and not ``replace``."""

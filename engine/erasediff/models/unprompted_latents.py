"""Latent diffusion model without prompts: base class of the class-conditional and unconditional families."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

from torch import Tensor

from erasediff.errors import UserError
from erasediff.models.autoencoder_model import AutoencoderModel
from erasediff.models.diffusion_model import in_channels


class UnpromptedLatentModel(AutoencoderModel):
    """Latent diffusion model whose denoiser takes a class label, or nothing; implements ``UnpromptedModel``.

    Images have the size that the denoiser was trained for.
    """

    def _check_components(self) -> None:
        super()._check_components()
        channels = self._autoencoder_config.in_channels
        if channels not in (1, 3):
            raise UserError(
                f"The {self.autoencoder_component} in {self.checkpoint.path} has images of {channels} channels: only 1 "
                "and 3 can be read."
            )

    @property
    def _denoiser_config(self) -> Any:
        return self.configs[self.denoiser_component]

    @property
    def num_classes(self) -> int | None:
        return None

    @property
    def null_label(self) -> int | None:
        return None

    @property
    def class_names(self) -> tuple[str, ...]:
        return ()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self._autoencoder_config.in_channels, *self.default_size

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self._denoiser_config.in_channels, *self.default_latent_size(self._denoiser_config)

    def encode_images(self, pixels: Tensor, *, sample_ids: Tensor | None = None, seed: int = 0) -> Tensor:
        pixels = in_channels(pixels, self.image_shape[0])
        return super().encode_images(pixels, sample_ids=sample_ids, seed=seed)

    def decode_samples(self, samples: Tensor) -> Tensor:
        return self.decode_latents(samples)

    @abstractmethod
    def described_by(self, class_names: tuple[str, ...]) -> Self:
        """This model with the classes of a data set. UserError for classes that the model does not have."""

"""Latent diffusion model: images to and from the latents of an autoencoder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from erasediff.diffusion.rng import NoiseRole, noise_key
from erasediff.errors import UserError
from erasediff.io.tensor_file import fingerprint
from erasediff.models.checkpoint.base import canonical_name
from erasediff.models.checkpoint_model import CheckpointModel
from erasediff.models.family import vae_scale
from erasediff.models.latent_statistics import latent_statistics
from erasediff.models.pipeline import POSTERIOR_NOISE
from erasediff.utils.finite import finite_weight
from erasediff_kernels import philox_noise


class AutoencoderModel(CheckpointModel):
    """Model whose samples are latents of an autoencoder, normalised as the denoiser expects them."""

    autoencoder_component = "vae"

    @abstractmethod
    def _widths(self) -> Iterable[tuple[str, int, str, int]]: ...

    @property
    def _autoencoder_config(self) -> Any:
        return self.configs[self.autoencoder_component]

    @property
    def latent_scale(self) -> int:
        """Pixels per latent along one side."""
        return vae_scale(self._autoencoder_config)

    @property
    def size_multiple(self) -> int:
        """Both sides of an image, in pixels, must be multiples of it."""
        return self.latent_scale

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the checkpoint was trained for."""
        height, width = self.default_latent_size(self.configs[self.denoiser_component])
        return height * self.latent_scale, width * self.latent_scale

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(C, h, w) of the latent of an image of ``height`` x ``width`` pixels.

        Raises:
            UserError: A side is no multiple of ``size_multiple``.
        """
        multiple = self.size_multiple
        if height <= 0 or width <= 0 or height % multiple or width % multiple:
            raise UserError(f"An image of {height}x{width} does not fit this model: give multiples of {multiple}.")
        return self._autoencoder_config.latent_channels, height // self.latent_scale, width // self.latent_scale

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, *, sample_ids: Tensor | None = None, seed: int = 0) -> Tensor:
        """Latents of images, normalised as the denoiser expects them.

        Args:
            pixels: [B, 3, H, W] in [-1, 1].
            sample_ids: [B] int64: draw from the VAE's posterior, addressed by (seed, sample id). None for its mean.
            seed: Of the draws.

        Returns:
            [B, C, h, w] float32.
        """
        posterior = self._posterior(pixels.to(self.device, torch.float32))
        latents: Tensor = posterior.mean
        if sample_ids is not None:
            key = noise_key(seed, POSTERIOR_NOISE, self.device)
            ids = sample_ids.to(self.device)
            latents = latents + posterior.std * philox_noise(ids, key, int(NoiseRole.SAMPLING), latents.shape[1:])
        return self._normalized(latents)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] float32 in [-1, 1] of ``latents`` [B, C, h, w]: the inverse of ``encode_images``."""
        return self._pixels(self._denormalized(latents.to(self.device, torch.float32))).clamp(-1, 1)

    def _posterior(self, pixels: Tensor) -> Any:
        """The VAE's distribution of latents, with ``mean`` and ``std`` [B, C, h, w]."""
        autoencoder: Any = self.encoders[self.autoencoder_component]
        return autoencoder.encode(pixels).latent_dist

    def _pixels(self, latents: Tensor) -> Tensor:
        """What the autoencoder decodes latents to that are not normalised."""
        autoencoder: Any = self.encoders[self.autoencoder_component]
        pixels: Tensor = autoencoder.decode(latents, return_dict=False)[0]
        return pixels

    def _normalized(self, latents: Tensor) -> Tensor:
        """Latents of the VAE as the denoiser takes them: shifted and scaled, or standardised channel by channel."""
        shift, scale = latent_statistics(self._autoencoder_config, self.device)
        normalized: Tensor = (latents - shift) * scale
        return normalized

    def _denormalized(self, latents: Tensor) -> Tensor:
        """The inverse of ``_normalized``."""
        shift, scale = latent_statistics(self._autoencoder_config, self.device)
        denormalized: Tensor = latents / scale + shift
        return denormalized

    @cached_property
    def hash(self) -> str:
        """SHA-256 over encoders and autoencoder: what a cache of latents and embeddings depends on."""
        shift, scale = latent_statistics(self._autoencoder_config, self.device)
        described = (str(self.dtype), scale, shift, *self._encoder_settings())
        return fingerprint(described, self._stored_encoders())

    def _encoder_settings(self) -> tuple[object, ...]:
        """What embeddings depend on besides weights, dtype and the statistics of latents."""
        return ()

    def _stored_encoders(self) -> Iterator[tuple[str, Tensor]]:
        for component in self._frozen_names:
            owner = f"{component} of {self.checkpoint.path}"
            stored = self.checkpoint.tensors(component)
            for name, tensor in sorted(((canonical_name(n), t) for n, t in stored.items()), key=lambda item: item[0]):
                yield f"{component}.{name}", finite_weight(tensor.load(), owner, name)

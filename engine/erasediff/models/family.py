"""What the stages need of a text-to-image checkpoint, whichever family it is of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from erasediff.models.components import Weights
from erasediff.objectives import Batch
from erasediff.process import Process

Layout = Literal["diffusers", "single-file"]


class TextToImageModel(Protocol):
    """A latent diffusion model with its text encoders, VAE and scheduler. One file per family implements it.

    family:          "sd" (1.x and 2.x), "sdxl", "sd3" or "flux"
    denoiser_module: the UNet or transformer, the only part that is trained
    process:         of the checkpoint's own scheduler, prediction type included
    latent_scale:    pixels per latent along one side
    size_multiple:   both sides of an image must be multiples of it
    default_size:    (height, width) in pixels that the checkpoint was trained for
    """

    @property
    def family(self) -> str: ...
    @property
    def denoiser_module(self) -> nn.Module: ...
    @property
    def process(self) -> Process: ...
    @property
    def original_layout(self) -> str | None:
        """The layout of the family's single files; None for a family without."""
        ...

    @property
    def denoiser_is_empty(self) -> bool:
        """Whether its weights are on the disk alone, and its parameters on the meta device."""
        ...

    def whole_denoiser(self) -> nn.Module:
        """``denoiser_module``, or where that is empty, one with weights that lives as long as the caller holds it."""
        ...

    @property
    def denoiser_weights(self) -> Weights:
        """The denoiser's weights as the checkpoint has them, in the dtype of the model, to be read one by one."""
        ...

    @property
    def device(self) -> torch.device: ...
    @property
    def latent_scale(self) -> int: ...
    @property
    def size_multiple(self) -> int: ...
    @property
    def default_size(self) -> tuple[int, int]: ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of an image's latent. UserError unless both sides are multiples of ``size_multiple``."""
        ...

    def denoiser(self, model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor:
        """An ``objectives.Denoiser``: the prediction [B, C, h, w] in the dtype of ``model``.

        The condition is what ``encode_prompts`` and ``size_condition`` return; everything else that the network takes,
        such as positions and packing, is made inside.
        """
        ...

    def encode_images(self, pixels: Tensor, *, sample_ids: Tensor | None = None, seed: int = 0) -> Tensor:
        """Latents [B, C, h, w] float32, shifted and scaled as the denoiser expects, of ``pixels`` [B, 3, H, W].

        Pixels are in [-1, 1]. Without ``sample_ids`` the mean of the VAE's posterior; with them, int64 [B], a draw from
        it that is addressed by (seed, sample id).
        """
        ...

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] float32 in [-1, 1] of ``latents`` [B, C, h, w]: the inverse of ``encode_images``."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The condition of each prompt: tensors [N, ...] in the encoders' dtype, on the model's device.

        The empty prompt is the null condition of classifier-free guidance, as the checkpoint's pipeline makes it.
        """
        ...

    def size_condition(
        self, original_size: tuple[int, int], crop: tuple[int, int], target_size: tuple[int, int], count: int
    ) -> dict[str, Tensor]:
        """``{"time_ids": [count, 6]}`` for SDXL, from (height, width), (top, left), (height, width); {} elsewhere."""
        ...

    def release_encoders(self) -> None:
        """Text encoders and VAE leave memory until they are next needed; ``hash`` stays."""
        ...

    def restore_encoders(self) -> None:
        """Loads text encoders and VAE now; whatever needs them does so by itself."""
        ...

    def sample(
        self,
        prompts: Sequence[str],
        *,
        negative_prompt: str = "",
        guidance_scale: float | None = None,
        num_inference_steps: int = 30,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        batch_size: int = 1,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """uint8 images [N, H, W, 3] on the host, one per prompt, by the checkpoint's diffusers pipeline and scheduler.

        The noise of image i, a stochastic sampler's included, is addressed by (seed, i): neither the batch size nor the
        other prompts change it. ``guidance_scale`` None is the family's usual one; ``progress`` is called with the
        number of images after each batch.
        """
        ...

    @property
    def hash(self) -> str:
        """SHA-256 over encoders and VAE: what a cache of latents and embeddings depends on."""
        ...

    def denoiser_hash(self) -> str:
        """SHA-256 over the denoiser's weights as they are now."""
        ...

    def save(
        self,
        path: Path,
        *,
        layout: Layout = "diffusers",
        dtype: torch.dtype | None = None,
        max_shard_size: int = 10_000_000_000,
        replace: bool = False,
    ) -> None:
        """Write the whole checkpoint, atomically: a diffusers folder, or one file in the original layout (sd, sdxl).

        ``dtype`` None keeps each tensor's stored dtype; every tensor that was not trained then has the input's bits.
        ``max_shard_size`` is in bytes, for the folder. UserError for a family without that layout, for a ``path``
        that exists unless ``replace``, and for what the disk refuses.
        """
        ...

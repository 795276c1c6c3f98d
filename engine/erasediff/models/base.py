"""Text-to-image model: base class of the families with prompts (text encoders, conditions, sampling)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from erasediff.models.autoencoder_model import AutoencoderModel
from erasediff.models.checkpoint.components import check_component
from erasediff.models.checkpoint.save import STABILITY_AI, modelspec
from erasediff.models.checkpoint_model import Layout
from erasediff.models.diffusion_model import Condition
from erasediff.models.pipeline import sample_images


class LatentModel(AutoencoderModel):
    """A latent diffusion model with its text encoders, VAE and scheduler.

    Attributes:
        tokenizers: The text encoders' tokenizers by component.
        has_null_prediction: Whether the empty prompt gives the unconditional prediction of classifier-free guidance.
    """

    has_null_prediction: ClassVar[bool] = True

    def _check_components(self) -> None:
        super()._check_components()
        self.tokenizers = {
            name: self.checkpoint.tokenizer(name)
            for name in (encoder.replace("text_encoder", "tokenizer") for encoder in self.encoder_names)
        }

    @property
    def condition(self) -> Condition:
        return "text"

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The condition of each prompt: tensors [N, ...] in the encoders' dtype, on the model's device.

        The empty prompt is the null condition of classifier-free guidance, as the checkpoint's pipeline makes it.
        """
        return self.embed_prompts(prompts)

    @abstractmethod
    def embed_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """``encode_prompts`` with gradients, for attacks on token embeddings (see ``text_tokens``)."""

    def size_condition(
        self, original_size: tuple[int, int], crop: tuple[int, int], target_size: tuple[int, int], count: int
    ) -> dict[str, Tensor]:
        """``{"time_ids": [count, 6]}`` for SDXL, from (height, width), (top, left), (height, width); {} elsewhere."""
        return {}

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
        """Images of ``prompts`` by the checkpoint's diffusers pipeline and scheduler.

        The noise of image i, a stochastic sampler's included, is addressed by (seed, i): neither the batch size nor the
        other prompts change it.

        Args:
            prompts: One for each image.
            negative_prompt: For all of them.
            guidance_scale: None for the family's ``default_guidance``.
            num_inference_steps: Of the sampler.
            height: In pixels; None for the model's ``default_size``.
            width: In pixels; None for the model's ``default_size``.
            seed: Of the noise.
            batch_size: Images that are made at once.
            progress: Called with the number of images after each batch.

        Returns:
            uint8 [N, H, W, 3] on the host.
        """
        return sample_images(
            self,
            prompts,
            negative_prompt=negative_prompt,
            guidance_scale=self.default_guidance if guidance_scale is None else guidance_scale,
            num_inference_steps=num_inference_steps,
            size=(height or self.default_size[0], width or self.default_size[1]),
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )

    def negative_arguments(self, prompt: str, count: int) -> dict[str, Any]:
        """The pipeline's arguments for a negative prompt of ``count`` images."""
        # Left out when empty: the pipeline then takes the checkpoint's own null condition.
        return {"negative_prompt": [prompt] * count} if prompt else {}

    def text_length(self) -> dict[str, Any]:
        """The pipeline's arguments for the length of prompts, so that all calls see the same tokens."""
        return {}

    def packed(self, latents: Tensor) -> Tensor:
        """``latents`` [B, C, h, w] as the pipeline and the network take them."""
        return latents

    def unpacked(self, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of ``packed``, for ``latent_shape``."""
        return latents

    def _encoder_settings(self) -> tuple[object, ...]:
        tokenizers = [(tokenizer.pad_token, tokenizer.model_max_length) for tokenizer in self.tokenizers.values()]
        # The modules' repr changes with the libraries that define them; it stays, or every cache would go cold.
        modules = [check_component(self.checkpoint, name) for name in self.encoder_names]
        return tokenizers, modules

    def _metadata(self, layout: Layout) -> dict[str, str]:
        return modelspec(
            self.checkpoint.metadata,
            architecture=self.architecture,
            implementation="diffusers" if layout == "diffusers" else STABILITY_AI,
            prediction_type=self.process.prediction_type,
            size=self.default_size,
        )

    @property
    @abstractmethod
    def architecture(self) -> str:
        """As ModelSpec names it."""

"""FLUX.1: a flow-matching transformer over packed latents, guidance distilled into it in the dev version."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from erasediff.diffusion.batch import Batch
from erasediff.errors import UserError
from erasediff.models.base import LatentModel, model_dtype

MAX_T5_TOKENS = 512
TRAINING_GUIDANCE = 1.0
"""At 1 the distilled network predicts without guidance, which is what a denoising loss is about."""


class Flux(LatentModel):
    """Condition: ``encoder_hidden_states`` [B, tokens, 4096], ``pooled_projections`` [B, 768], maybe ``guidance`` [B].

    The network sees each 2x2 patch of a latent as one token; packing and positions are made here.
    """

    family = "flux"
    denoiser_component = "transformer"
    text_encoders: ClassVar = ("text_encoder", "text_encoder_2")
    pipeline_class = FluxPipeline
    flow = True
    default_guidance = 3.5
    architecture = "flux-1"

    @property
    def size_multiple(self) -> int:
        return 2 * self.latent_scale

    @property
    def default_size(self) -> tuple[int, int]:
        # The transformer's configuration does not say; FLUX.1 was trained around one megapixel.
        return 128 * self.latent_scale, 128 * self.latent_scale

    def _widths(self) -> Iterable[tuple[str, int, str, int]]:
        transformer, vae = self.configs["transformer"], self.configs["vae"]
        clip, t5 = self.configs["text_encoder"], self.configs["text_encoder_2"]
        channels = 4 * vae.latent_channels
        yield "the transformer's in_channels", transformer.in_channels, "four times the VAE's latent_channels", channels
        yield "the transformer's pooled_projection_dim", transformer.pooled_projection_dim, "CLIP's", clip.hidden_size
        yield "the transformer's joint_attention_dim", transformer.joint_attention_dim, "T5's d_model", t5.d_model

    def predict(self, model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor:
        dtype = model_dtype(model)
        text = {name: condition[name].to(dtype) for name in ("encoder_hidden_states", "pooled_projections")}
        _, _, height, width = noisy_sample.shape
        guidance = condition.get("guidance")
        if guidance is None and self.configs["transformer"].guidance_embeds:
            guidance = torch.full_like(timesteps, TRAINING_GUIDANCE, dtype=torch.float32)
        prediction: Tensor = model(
            pack(noisy_sample.to(dtype)),
            timestep=timesteps / 1000,
            guidance=guidance,
            img_ids=positions(height // 2, width // 2, noisy_sample.device).to(dtype),
            txt_ids=torch.zeros(text["encoder_hidden_states"].shape[1], 3, device=noisy_sample.device, dtype=dtype),
            **text,
            return_dict=False,
        )[0]
        return unpack(prediction, height, width)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        text, pooled, _ = self._pipeline().encode_prompt(list(prompts), None, device=self.device, **self._text_length())
        return {"encoder_hidden_states": text, "pooled_projections": pooled}

    def _text_length(self) -> dict[str, Any]:
        return {"max_sequence_length": min(MAX_T5_TOKENS, self.tokenizers["tokenizer_2"].model_max_length)}

    def _negative(self, prompt: str, count: int) -> dict[str, Any]:
        if prompt:
            raise UserError("FLUX is sampled without a negative prompt: its guidance is part of the network.")
        return {}

    def _packed(self, latents: Tensor) -> Tensor:
        return pack(latents)

    def _unpacked(self, latents: Tensor, shape: tuple[int, int, int]) -> Tensor:
        return unpack(latents, *shape[1:])


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h/2 w/2, 4C]: one token per 2x2 patch."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height // 2 * (width // 2), 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of ``pack``."""
    batch, _, features = tokens.shape
    patches = tokens.reshape(batch, height // 2, width // 2, features // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, features // 4, height, width)


def positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """[rows columns, 3]: (0, row, column) of each token."""
    row, column = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3)

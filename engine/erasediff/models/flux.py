"""FLUX.1: a flow-matching transformer over packed latents, guidance distilled into it in the dev version."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from erasediff.diffusion.batch import Batch
from erasediff.errors import UserError
from erasediff.models.base import LatentModel
from erasediff.models.checkpoint import transformer_layouts
from erasediff.models.checkpoint.original_layout import Place
from erasediff.models.checkpoint_model import model_dtype
from erasediff.models.family import JOINT_SUBSETS
from erasediff.models.pipeline import build_pipeline

MAX_T5_TOKENS = 512
TIMESTEP_SCALE = 1000
"""diffusers' FluxTransformer2DModel multiplies its timestep by it, whatever the scheduler; FluxPipeline divides."""
TRAINING_GUIDANCE = 1.0
"""At 1 the distilled network predicts without guidance, which is what a denoising loss is about."""
FLUX_1_DEV: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
"""FLUX.1-dev's transformer, 11.90 billion parameters (its published config.json)."""


class Flux(LatentModel):
    """Condition: ``encoder_hidden_states`` [B, tokens, 4096], ``pooled_projections`` [B, 768], maybe ``guidance`` [B].

    The network sees each 2x2 patch of a latent as one token; packing and positions are made here.
    """

    family = "flux"
    denoiser_component = "transformer"
    denoiser_class = FluxTransformer2DModel
    text_encoders: ClassVar = ("text_encoder", "text_encoder_2")
    pipeline_class = FluxPipeline
    flow = True
    default_guidance = 3.5
    architecture = "flux-1"
    has_null_prediction = False
    subsets = JOINT_SUBSETS
    reference_configs: ClassVar = {"flux": (FLUX_1_DEV, 1024)}

    @property
    def size_multiple(self) -> int:
        return 2 * self.latent_scale

    @classmethod
    def default_latent_size(cls, config: Any) -> tuple[int, int]:
        # The transformer's configuration does not say; FLUX.1 was trained around one megapixel.
        return 128, 128

    @classmethod
    def dummy_inputs(
        cls, config: Any, batch_size: int, latent_size: tuple[int, int], dtype: torch.dtype, device: torch.device | str
    ) -> dict[str, Any]:
        height, width = latent_size
        patches = (height // 2) * (width // 2)
        shapes = {
            "hidden_states": (batch_size, patches, config.in_channels),
            "encoder_hidden_states": (batch_size, MAX_T5_TOKENS, config.joint_attention_dim),
            "pooled_projections": (batch_size, config.pooled_projection_dim),
            "img_ids": (patches, 3),
            "txt_ids": (MAX_T5_TOKENS, 3),
        }
        zeros = {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
        return {**zeros, "guidance": torch.ones(batch_size, device=device) if config.guidance_embeds else None}

    @classmethod
    def original_place(cls, name: str, config: Any) -> Place | None:
        return transformer_layouts.flux(name, config)

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
            timestep=timesteps / TIMESTEP_SCALE,
            guidance=guidance,
            img_ids=positions(height // 2, width // 2, noisy_sample.device).to(dtype),
            txt_ids=torch.zeros(text["encoder_hidden_states"].shape[1], 3, device=noisy_sample.device, dtype=dtype),
            **text,
            return_dict=False,
        )[0]
        return unpack(prediction, height, width)

    def embed_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        text, pooled, _ = build_pipeline(self).encode_prompt(
            list(prompts), None, device=self.device, **self.text_length()
        )
        return {"encoder_hidden_states": text, "pooled_projections": pooled}

    def text_length(self) -> dict[str, Any]:
        return {"max_sequence_length": min(MAX_T5_TOKENS, self.tokenizers["tokenizer_2"].model_max_length)}

    def negative_arguments(self, prompt: str, count: int) -> dict[str, Any]:
        if prompt:
            raise UserError("FLUX is sampled without a negative prompt: its guidance is part of the network.")
        return {}

    def packed(self, latents: Tensor) -> Tensor:
        return pack(latents)

    def unpacked(self, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        _, height, width = shape
        return unpack(latents, height, width)


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

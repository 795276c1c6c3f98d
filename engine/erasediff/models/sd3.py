"""Stable Diffusion 3 and 3.5: a flow-matching transformer over image and text tokens (Esser et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from erasediff.diffusion.batch import Batch
from erasediff.models.base import LatentModel
from erasediff.models.checkpoint import transformer_layouts
from erasediff.models.checkpoint.original_layout import Place
from erasediff.models.checkpoint_model import model_dtype
from erasediff.models.family import JOINT_SUBSETS
from erasediff.models.pipeline import build_pipeline

CLIP_TOKENS, MAX_T5_TOKENS = 77, 256


class StableDiffusion3(LatentModel):
    """Condition: ``encoder_hidden_states`` [B, tokens, 4096] and ``pooled_projections`` [B, 2048].

    T5 may be left out; its tokens are then zero.
    """

    family = "sd3"
    denoiser_component = "transformer"
    denoiser_class = SD3Transformer2DModel
    text_encoders: ClassVar = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional_encoders: ClassVar = ("text_encoder_3",)
    pipeline_class = StableDiffusion3Pipeline
    flow = True
    default_guidance = 7.0
    architecture = "stable-diffusion-3"
    subsets = JOINT_SUBSETS

    @classmethod
    def dummy_inputs(
        cls, config: Any, batch_size: int, latent_size: tuple[int, int], dtype: torch.dtype, device: torch.device | str
    ) -> dict[str, Any]:
        tokens = CLIP_TOKENS + MAX_T5_TOKENS
        shapes = {
            "hidden_states": (config.in_channels, *latent_size),
            "encoder_hidden_states": (tokens, config.joint_attention_dim),
            "pooled_projections": (config.pooled_projection_dim,),
        }
        return {name: torch.zeros(batch_size, *shape, dtype=dtype, device=device) for name, shape in shapes.items()}

    @property
    def size_multiple(self) -> int:
        patch: int = self.configs["transformer"].patch_size
        return self.latent_scale * patch

    @classmethod
    def original_place(cls, name: str, config: Any) -> Place | None:
        return transformer_layouts.sd3(name, config)

    def _widths(self) -> Iterable[tuple[str, int, str, int]]:
        transformer, vae = self.configs["transformer"], self.configs["vae"]
        pooled = sum(self.configs[name].projection_dim for name in ("text_encoder", "text_encoder_2"))
        yield "the transformer's in_channels", transformer.in_channels, "the VAE's latent_channels", vae.latent_channels
        yield (
            "the transformer's pooled_projection_dim",
            transformer.pooled_projection_dim,
            "the two CLIP encoders' projection_dim together",
            pooled,
        )
        if t5 := self.configs.get("text_encoder_3"):
            yield "the transformer's joint_attention_dim", transformer.joint_attention_dim, "T5's d_model", t5.d_model

    def predict(self, model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor:
        dtype = model_dtype(model)
        text = {name: condition[name].to(dtype) for name in ("encoder_hidden_states", "pooled_projections")}
        prediction: Tensor = model(noisy_sample.to(dtype), timestep=timesteps, **text, return_dict=False)[0]
        return prediction

    def embed_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        text, _, pooled, _ = build_pipeline(self).encode_prompt(
            list(prompts), None, None, device=self.device, do_classifier_free_guidance=False, **self.text_length()
        )
        return {"encoder_hidden_states": text, "pooled_projections": pooled}

    def text_length(self) -> dict[str, Any]:
        t5 = self.tokenizers.get("tokenizer_3")
        return {"max_sequence_length": min(MAX_T5_TOKENS, t5.model_max_length if t5 else MAX_T5_TOKENS)}

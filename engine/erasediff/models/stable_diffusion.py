"""Stable Diffusion 1.x, 2.x and XL: a UNet that attends to the tokens of CLIP text encoders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn

from erasediff.diffusion.batch import Batch
from erasediff.models.base import LatentModel
from erasediff.models.checkpoint.default_configs import KNOWN_CONFIGS
from erasediff.models.checkpoint.original_layout import LAYOUTS, Place
from erasediff.models.checkpoint_model import model_dtype
from erasediff.models.pipeline import build_pipeline

CLIP_TOKENS = 77


class StableDiffusion(LatentModel):
    """Condition: ``encoder_hidden_states`` [B, 77, D]. 2.x differs in widths, text encoder and prediction type only."""

    family = "sd"
    denoiser_component = "unet"
    denoiser_class = UNet2DConditionModel
    text_encoders: ClassVar = ("text_encoder",)
    pipeline_class = StableDiffusionPipeline
    flow = False
    default_guidance = 7.5
    reference_configs: ClassVar = {
        "sd15": (KNOWN_CONFIGS["sd1"]["unet"], 512),
        "sd21": (KNOWN_CONFIGS["sd2"]["unet"], 768),
    }

    @classmethod
    def has_denoiser(cls, class_name: str, config: Any) -> bool:
        return super().has_denoiser(class_name, config) and config.get("addition_embed_type") is None

    @classmethod
    def dummy_inputs(
        cls, config: Any, batch_size: int, latent_size: tuple[int, int], dtype: torch.dtype, device: torch.device | str
    ) -> dict[str, Any]:
        return {
            "sample": torch.zeros(batch_size, config.in_channels, *latent_size, dtype=dtype, device=device),
            "encoder_hidden_states": torch.zeros(
                batch_size, CLIP_TOKENS, config.cross_attention_dim, dtype=dtype, device=device
            ),
        }

    @classmethod
    def original_place(cls, name: str, config: Any) -> Place | None:
        return LAYOUTS["sd1"]["unet"](name, config)

    @classmethod
    def kohya_name(cls, name: str, module: nn.Module) -> str | None:
        return name

    def _widths(self) -> Iterable[tuple[str, int, str, int]]:
        unet, vae, text = self.configs["unet"], self.configs["vae"], self.configs["text_encoder"]
        yield "the UNet's in_channels", unet.in_channels, "the VAE's latent_channels", vae.latent_channels
        yield (
            "the UNet's cross_attention_dim",
            unet.cross_attention_dim,
            "the text encoder's hidden_size",
            text.hidden_size,
        )

    def predict(self, model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor:
        dtype = model_dtype(model)
        text = condition["encoder_hidden_states"].to(dtype)
        prediction: Tensor = model(noisy_sample.to(dtype), timesteps, text, return_dict=False)[0]
        return prediction

    @property
    def original_layout(self) -> str:
        # OpenCLIP's text encoder, which came with 2.0, has the exact GELU, OpenAI's an approximation.
        return "sd2" if self.configs["text_encoder"].hidden_act == "gelu" else "sd1"

    @property
    def architecture(self) -> str:
        if self.original_layout == "sd1":
            return "stable-diffusion-v1"
        return f"stable-diffusion-v2-{'768-v' if self.process.prediction_type == 'v_prediction' else '512'}"

    def embed_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        text, _ = build_pipeline(self).encode_prompt(list(prompts), self.device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": text}


class StableDiffusionXL(LatentModel):
    """Condition: ``encoder_hidden_states`` [B, 77, 2048], ``text_embeds`` [B, 1280], ``time_ids`` [B, 6]."""

    family = "sdxl"
    denoiser_component = "unet"
    denoiser_class = UNet2DConditionModel
    text_encoders: ClassVar = ("text_encoder", "text_encoder_2")
    pipeline_class = StableDiffusionXLPipeline
    flow = False
    default_guidance = 5.0
    architecture = "stable-diffusion-xl-v1-base"
    original_layout = "sdxl"
    reference_configs: ClassVar = {"sdxl": (KNOWN_CONFIGS["sdxl"]["unet"], 1024)}

    @classmethod
    def has_denoiser(cls, class_name: str, config: Any) -> bool:
        return super().has_denoiser(class_name, config) and config.get("addition_embed_type") == "text_time"

    @classmethod
    def dummy_inputs(
        cls, config: Any, batch_size: int, latent_size: tuple[int, int], dtype: torch.dtype, device: torch.device | str
    ) -> dict[str, Any]:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {
            **StableDiffusion.dummy_inputs(config, batch_size, latent_size, dtype, device),
            "added_cond_kwargs": {
                "text_embeds": torch.zeros(batch_size, pooled, dtype=dtype, device=device),
                "time_ids": torch.zeros(batch_size, 6, dtype=dtype, device=device),
            },
        }

    @classmethod
    def original_place(cls, name: str, config: Any) -> Place | None:
        return LAYOUTS["sdxl"]["unet"](name, config)

    @classmethod
    def kohya_name(cls, name: str, module: nn.Module) -> str | None:
        place = cls.original_place(f"{name}.weight", module.config)
        # conv_in and the like have a place in the layout too; a layer without one has diffusers' name alone.
        return None if place is None else place.key.removeprefix("model.diffusion_model.").removesuffix(".weight")

    def _widths(self) -> Iterable[tuple[str, int, str, int]]:
        unet, vae = self.configs["unet"], self.configs["vae"]
        first, second = self.configs["text_encoder"], self.configs["text_encoder_2"]
        added = 6 * unet.addition_time_embed_dim + second.projection_dim
        yield "the UNet's in_channels", unet.in_channels, "the VAE's latent_channels", vae.latent_channels
        yield (
            "the UNet's cross_attention_dim",
            unet.cross_attention_dim,
            "the two text encoders' hidden_size together",
            first.hidden_size + second.hidden_size,
        )
        yield (
            "the UNet's projection_class_embeddings_input_dim",
            unet.projection_class_embeddings_input_dim,
            "that of six sizes and the second text encoder's projection",
            added,
        )

    def predict(self, model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor:
        dtype = model_dtype(model)
        text = condition["encoder_hidden_states"].to(dtype)
        added = {name: condition[name].to(dtype) for name in ("text_embeds", "time_ids")}
        prediction: Tensor = model(noisy_sample.to(dtype), timesteps, text, added_cond_kwargs=added, return_dict=False)[
            0
        ]
        return prediction

    def embed_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        text, _, pooled, _ = build_pipeline(self).encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        if self.checkpoint.index.get("force_zeros_for_empty_prompt", True):
            has_text = torch.tensor([bool(prompt) for prompt in prompts], device=self.device)
            text, pooled = text * has_text[:, None, None], pooled * has_text[:, None]
        return {"encoder_hidden_states": text, "text_embeds": pooled}

    def size_condition(
        self, original_size: tuple[int, int], crop: tuple[int, int], target_size: tuple[int, int], count: int
    ) -> dict[str, Tensor]:
        row = torch.tensor([*original_size, *crop, *target_size], dtype=torch.float32, device=self.device)
        return {"time_ids": row.expand(count, 6).contiguous()}

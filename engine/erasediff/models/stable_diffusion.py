"""Stable Diffusion 1.x and 2.x: a UNet that attends to the tokens of one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn

from erasediff.diffusion.batch import Batch
from erasediff.io.tensor_file import StoredTensor
from erasediff.models.base import LatentModel, model_dtype


class StableDiffusion(LatentModel):
    """Condition: ``encoder_hidden_states`` [B, 77, D]. 2.x differs in widths, text encoder and prediction type only."""

    family = "sd"
    denoiser_component = "unet"
    text_encoders: ClassVar = ("text_encoder",)
    pipeline_class = StableDiffusionPipeline
    flow = False
    default_guidance = 7.5

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

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        text, _ = self._pipeline().encode_prompt(list(prompts), self.device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": text}


class StableDiffusionXL(LatentModel):
    """Condition: ``encoder_hidden_states`` [B, 77, 2048], ``text_embeds`` [B, 1280], ``time_ids`` [B, 6]."""

    family = "sdxl"
    denoiser_component = "unet"
    text_encoders: ClassVar = ("text_encoder", "text_encoder_2")
    pipeline_class = StableDiffusionXLPipeline
    flow = False
    default_guidance = 5.0
    architecture = "stable-diffusion-xl-v1-base"
    original_layout = "sdxl"

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

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        text, _, pooled, _ = self._pipeline().encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        if self.checkpoint.index.get("force_zeros_for_empty_prompt", True):
            asked = torch.tensor([bool(prompt) for prompt in prompts], device=self.device)
            text, pooled = text * asked[:, None, None], pooled * asked[:, None]
        return {"encoder_hidden_states": text, "text_embeds": pooled}

    def size_condition(
        self, original_size: tuple[int, int], crop: tuple[int, int], target_size: tuple[int, int], count: int
    ) -> dict[str, Tensor]:
        row = torch.tensor([*original_size, *crop, *target_size], dtype=torch.float32, device=self.device)
        return {"time_ids": row.expand(count, 6).contiguous()}

    def _markers(self) -> dict[str, StoredTensor]:
        # By convention among trainers and samplers of SDXL, whose layout says nothing else of the prediction type.
        if self.process.prediction_type != "v_prediction":
            return {}
        zero_snr = self.scheduler.config.get("rescale_betas_zero_snr")
        empty = StoredTensor(torch.float32, (0,), lambda: torch.empty(0))
        return {"v_pred": empty, **({"ztsnr": empty} if zero_snr else {})}

"""Sampling by a checkpoint's own diffusers pipeline, from noise that is addressed by image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from erasediff.diffusion.rng import NoiseRole, noise_key
from erasediff_kernels import philox_bits, philox_noise

if TYPE_CHECKING:
    from erasediff.models.base import LatentModel

INITIAL_NOISE, SAMPLER_SEED, POSTERIOR_NOISE = range(3)
"""The step in the Philox address of draws that belong to no training step."""


def build_pipeline(model: LatentModel, denoiser: nn.Module | None = None) -> Any:
    """The diffusers pipeline of a model's components, without a safety checker, which would black out measurements.

    Args:
        model: Whose encoders, tokenizers and scheduler it takes.
        denoiser: In the place of the model's own.
    """
    denoiser = model.denoiser if denoiser is None else denoiser
    settings = {name: value for name, value in model.checkpoint.index.items() if isinstance(value, bool)}
    settings["requires_safety_checker"] = False
    components = {
        **dict.fromkeys(model.optional_encoders),
        **dict.fromkeys(name.replace("text_encoder", "tokenizer") for name in model.optional_encoders),
        **model.encoders,
        **model.tokenizers,
        model.denoiser_component: denoiser,
        "scheduler": type(model.scheduler).from_config(model.scheduler.config),
    }
    parameters = signature(model.pipeline_class.__init__).parameters
    chosen = {name: value for name, value in settings.items() if name in parameters}
    absent = dict.fromkeys({"safety_checker", "feature_extractor"} & set(parameters))
    pipeline = model.pipeline_class(**components, **chosen, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def sample_images(
    model: LatentModel,
    prompts: Sequence[str],
    *,
    negative_prompt: str,
    guidance_scale: float,
    num_inference_steps: int,
    size: tuple[int, int],
    seed: int,
    batch_size: int,
    progress: Callable[[int], None] | None,
) -> Tensor:
    """uint8 images [N, H, W, 3] on the host of ``size`` (height, width); arguments as of ``LatentModel.sample``."""
    model.process.check_inference_steps(num_inference_steps)
    height, width = size
    shape = model.latent_shape(height, width)
    denoiser = model.materialize_denoiser()
    pipeline = build_pipeline(model, denoiser)
    was_training = denoiser.training
    denoiser.eval()
    images = [torch.empty(0, height, width, 3, dtype=torch.uint8)]
    for first in range(0, len(prompts), batch_size):
        ids = torch.arange(first, min(first + batch_size, len(prompts)))
        noise = philox_noise(ids, noise_key(seed, INITIAL_NOISE, "cpu"), int(NoiseRole.SAMPLING), shape)
        latents = pipeline(
            prompt=[prompts[i] for i in ids.tolist()],
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            latents=model.packed(noise.to(model.device, model.dtype)),
            generator=image_generators(ids, seed),
            output_type="latent",
            **model.negative_arguments(negative_prompt, len(ids)),
            **model.text_length(),
        ).images
        pixels = model.decode_latents(model.unpacked(latents, shape))
        images.append(((pixels.permute(0, 2, 3, 1) + 1) * 127.5).round().to("cpu", torch.uint8))
        if progress is not None:
            progress(len(ids))
    denoiser.train(was_training)
    return torch.cat(images)


def image_generators(ids: Tensor, seed: int) -> list[torch.Generator]:
    """For samplers that draw noise at every step: one generator per image, on the host so that devices agree."""
    seeds = philox_bits(ids, noise_key(seed, SAMPLER_SEED, "cpu"), int(NoiseRole.SAMPLING), 1)[:, 0]
    return [torch.Generator().manual_seed(number) for number in seeds.tolist()]

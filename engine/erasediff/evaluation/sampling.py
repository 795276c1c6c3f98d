"""Sampling from a model without prompts; each image is a function of (seed, its index, its class) alone."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from erasediff.diffusion.rng import NoiseRole, noise_key
from erasediff.models.diffusion_model import UnpromptedModel
from erasediff.models.pipeline import INITIAL_NOISE, image_generators
from erasediff_kernels import philox_noise


@torch.no_grad()
def sample_images(
    model: UnpromptedModel,
    class_labels: Tensor | None,
    count: int | None = None,
    *,
    guidance_scale: float | None = None,
    num_inference_steps: int = 10,
    seed: int = 0,
    batch_size: int = 256,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Images [N, C, H, W] float32 in [-1, 1] on the host.

    Pixels are sampled by DPM-Solver++ (Lu et al. 2022), latents by the checkpoint's own scheduler. All noise of image i
    is addressed by (seed, i), so neither the batch size nor the other images change it: two models sampled with one
    seed are compared image by image.

    Args:
        model: Model, in evaluation mode during sampling.
        class_labels: int64 [N], the class of each image; None for an unconditional model.
        count: N, needed without labels.
        guidance_scale: w of classifier-free guidance, u + w (c - u); 1 is the conditional prediction, 0 the null
            label's; a model without a null label has the conditional prediction alone. None for the family's
            ``default_guidance``.
        num_inference_steps: Steps of the sampler.
        seed: Seed of the noise.
        batch_size: Images per call.
        progress: Called after each batch with the number of images in it.

    Raises:
        ValueError: Labels do not fit the model, or the count.
        UserError: More steps than the model has timesteps.
    """
    if (class_labels is None) != (model.condition == "none"):
        raise ValueError("class_labels are needed by a conditional model, and by no other")
    if class_labels is not None:
        if count not in (None, len(class_labels)):
            raise ValueError(f"{len(class_labels)} class_labels ask for as many images, not {count}")
        count = len(class_labels)
    if count is None:
        raise ValueError("an unconditional model needs a count")
    model.process.check_inference_steps(num_inference_steps)
    guidance_scale = model.default_guidance if guidance_scale is None else guidance_scale

    was_training = model.denoiser.training
    model.denoiser.eval()
    images = []
    for ids in torch.split(torch.arange(count, device=model.device), batch_size):
        labels = None if class_labels is None else class_labels.to(model.device)[ids]
        sample = _denoise(model, ids, labels, guidance_scale, num_inference_steps, seed)
        images.append(model.decode_samples(sample).cpu())
        if progress is not None:
            progress(len(ids))
    model.denoiser.train(was_training)
    return torch.cat(images)


def _denoise(
    model: UnpromptedModel,
    ids: Tensor,
    labels: Tensor | None,
    guidance_scale: float,
    num_inference_steps: int,
    seed: int,
) -> Tensor:
    sampler = _sampler(model)
    sampler.set_timesteps(num_inference_steps, device=model.device)
    options = (
        {"generator": image_generators(ids.cpu(), seed)} if "generator" in signature(sampler.step).parameters else {}
    )
    key = noise_key(seed, INITIAL_NOISE, model.device)
    sample: Tensor = philox_noise(ids, key, int(NoiseRole.SAMPLING), model.sample_shape) * sampler.init_noise_sigma
    for timestep in sampler.timesteps:
        prediction = _guided(model, sampler.scale_model_input(sample, timestep), timestep, labels, guidance_scale)
        sample = sampler.step(prediction, timestep, sample, return_dict=False, **options)[0]
    return sample


def _sampler(model: UnpromptedModel) -> Any:
    config = model.scheduler.config
    if model.space == "pixel":
        # Thresholding at 1 keeps every intermediate estimate of x_0 in the pixels' range; trailing spacing begins at
        # the last train timestep, where x_T is the noise drawn here (Lin et al. 2023, "Common Diffusion Noise
        # Schedules").
        return DPMSolverMultistepScheduler.from_config(
            config, thresholding=True, sample_max_value=1.0, timestep_spacing="trailing"
        )
    # A learned variance is not among the channels that ``predict`` returns.
    is_learned = str(config.get("variance_type")).startswith("learned")
    return type(model.scheduler).from_config(config, **({"variance_type": "fixed_small"} if is_learned else {}))


def _guided(
    model: UnpromptedModel, sample: Tensor, timestep: Tensor, labels: Tensor | None, guidance_scale: float
) -> Tensor:
    """u + w (c - u); one pass of twice the batch, and a plain one where a term has no weight."""
    if labels is None or model.null_label is None:
        return _predict(model, sample, timestep, labels)
    null = torch.full_like(labels, model.null_label)
    if guidance_scale in (0.0, 1.0):
        return _predict(model, sample, timestep, labels if guidance_scale == 1.0 else null)
    both = _predict(model, torch.cat((sample, sample)), timestep, torch.cat((labels, null)))
    conditional, unconditional = both.chunk(2)
    return torch.lerp(unconditional, conditional, guidance_scale)


def _predict(model: UnpromptedModel, sample: Tensor, timestep: Tensor, labels: Tensor | None) -> Tensor:
    condition = {} if labels is None else {"class_labels": labels}
    return model.predict(model.denoiser, sample, timestep.to(sample.device).expand(len(sample)), condition)

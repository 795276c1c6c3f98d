"""Sampling from a pixel-space model; each image is a function of (seed, its index, its class) alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from erasediff.diffusion.rng import NoiseRole, noise_key
from erasediff.models.pixel_unet import PixelModel
from erasediff_kernels import philox_noise

DEFAULT_GUIDANCE = 1.5


@torch.inference_mode()
def sample_images(
    model: PixelModel,
    class_labels: Tensor | None,
    count: int | None = None,
    *,
    guidance_scale: float = DEFAULT_GUIDANCE,
    num_inference_steps: int = 10,
    seed: int = 0,
    batch_size: int = 256,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Images [N, C, H, W] float32 in [-1, 1] on the host, by DPM-Solver++ (Lu et al. 2022).

    The noise that image i begins with is addressed by (seed, i), so neither the batch size nor the other images
    change it: two models sampled with one seed are compared image by image.

    Args:
        model: Model, in evaluation mode during sampling.
        class_labels: int64 [N], the class of each image; None for an unconditional model.
        count: N, needed without labels.
        guidance_scale: w of classifier-free guidance, u + w (c - u); 1 is the conditional prediction, 0 the null
            label's; a model without a null label has the conditional prediction alone.
        num_inference_steps: Steps of the sampler.
        seed: Seed of the initial noise.
        batch_size: Images per call.
        progress: Called after each batch with the number of images in it.

    Raises:
        ValueError: Labels do not fit the model, or the count.
    """
    if (class_labels is None) != (model.num_classes is None):
        raise ValueError("class_labels are needed by a conditional model, and by no other")
    if class_labels is not None:
        if count not in (None, len(class_labels)):
            raise ValueError(f"{len(class_labels)} class_labels ask for as many images, not {count}")
        count = len(class_labels)
    if count is None:
        raise ValueError("an unconditional model needs a count")

    was_training = model.unet.training
    model.unet.eval()
    images = []
    for ids in torch.split(torch.arange(count, device=model.device), batch_size):
        labels = None if class_labels is None else class_labels.to(model.device)[ids]
        images.append(_denoise(model, ids, labels, guidance_scale, num_inference_steps, seed).cpu())
        if progress is not None:
            progress(len(ids))
    model.unet.train(was_training)
    return torch.cat(images)


def _denoise(
    model: PixelModel, ids: Tensor, labels: Tensor | None, guidance_scale: float, num_inference_steps: int, seed: int
) -> Tensor:
    # Thresholding at 1 keeps every intermediate estimate of x_0 in the pixels' range; trailing spacing begins at the
    # last train timestep, where x_T is the noise drawn here (Lin et al. 2023, "Common Diffusion Noise Schedules").
    sampler = DPMSolverMultistepScheduler.from_config(
        model.scheduler.config, thresholding=True, sample_max_value=1.0, timestep_spacing="trailing"
    )
    sampler.set_timesteps(num_inference_steps, device=model.device)
    sample = philox_noise(ids, noise_key(seed, 0, model.device), int(NoiseRole.SAMPLING), model.image_shape)
    for timestep in sampler.timesteps:
        prediction = _guided(model, sample, timestep, labels, guidance_scale)
        sample = sampler.step(prediction, timestep, sample, return_dict=False)[0]
    return sample.clamp(-1, 1)


def _guided(
    model: PixelModel, sample: Tensor, timestep: Tensor, labels: Tensor | None, guidance_scale: float
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


def _predict(model: PixelModel, sample: Tensor, timestep: Tensor, labels: Tensor | None) -> Tensor:
    prediction: Tensor = model.unet(sample, timestep, class_labels=labels, return_dict=False)[0]
    return prediction

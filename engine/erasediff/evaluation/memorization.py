"""Membership inference by denoising loss, and detection of reproduced training images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from erasediff.diffusion.batch import Batch, Denoiser, condition_of, diffusers_denoiser, with_sample_ids
from erasediff.diffusion.noise_schedule import Process
from erasediff.diffusion.rng import NoiseRole, noise_key
from erasediff_kernels import add_noise, denoising_loss


@torch.no_grad()
def image_losses(
    model: nn.Module,
    batch: Batch,
    *,
    process: Process,
    denoiser: Denoiser = diffusers_denoiser,
    draws: int = 20,
    seed: int = 0,
) -> Tensor:
    """Denoising loss of each image, the mean over ``draws`` timesteps evenly spread over all.

    The score of a membership inference attack that has the model and an image (Yeom et al. 2018; Carlini et al.
    2023, section 5.2).
    The noise is addressed by (``seed``, draw, sample id): two models are asked about the same noisy images, and an
    image's loss depends on no other.

    Args:
        model: Denoising network on the batch's device.
        batch: "sample" [B, ...] and its condition; "sample_ids" int64 [B], if any.
        process: Noise schedule and prediction type.
        denoiser: How the model is called.
        draws: Timesteps per image.
        seed: Seed of the noise.

    Returns:
        float32 [B] on the host.

    Raises:
        ValueError: ``draws`` is less than one, or the batch is invalid (see ``with_sample_ids``).
    """
    total: Tensor | None = None
    for losses in draw_losses(model, batch, process=process, denoiser=denoiser, draws=draws, seed=seed):
        total = losses if total is None else total + losses
    assert total is not None
    return (total / draws).float().cpu()


@torch.no_grad()
def draw_losses(
    model: nn.Module,
    batch: Batch,
    *,
    process: Process,
    denoiser: Denoiser = diffusers_denoiser,
    draws: int = 20,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Losses float32 [B] of each draw that ``image_losses`` is the mean of; arguments and errors as there."""
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    batch = with_sample_ids(batch)
    sample, ids = batch["sample"], batch["sample_ids"]
    process = process.to(sample.device)
    for draw in range(draws):
        key = noise_key(seed, draw, sample.device)
        timesteps = torch.full_like(ids, int((draw + 0.5) / draws * process.num_train_timesteps))
        alpha, sigma = process.coefficients(timesteps)
        role = int(NoiseRole.MEMBERSHIP)
        noisy_sample = add_noise(sample, alpha, sigma, sample_ids=ids, key=key, role=role)
        prediction = denoiser(model, noisy_sample, process.conditioning[timesteps], condition_of(batch))
        gradient = denoising_loss(
            prediction.float(),
            sample.float(),
            alpha,
            sigma,
            prediction_type=process.prediction_type,
            weight=torch.ones(len(sample), device=sample.device),
            sample_ids=ids,
            key=key,
            role=role,
        ).grad
        yield sample_losses(gradient)


def sample_losses(gradient: Tensor) -> Tensor:
    """Mean squared error of each sample, float32 [B], from the gradient [B, ...] of their sum.

    The gradient of mean_e (p_e - target_e)^2 over E elements is 2 (p - target) / E, so one kernel gives all losses.
    """
    elements = gradient.flatten(1)
    return elements.float().square().sum(1) * (elements.shape[1] / 4)


def membership_auc(members: Tensor, others: Tensor) -> float:
    """AUC of membership inference from losses of members [M] and non-members [N] (Mann & Whitney 1947).

    The probability that a member has the lower loss of a random pair, ties counted half: 0.5 is chance,
    1 identifies every member, and so does 0, by a loss that is conspicuously high.

    Raises:
        ValueError: There are no members, or no others.
    """
    if not len(members) or not len(others):
        raise ValueError("membership needs at least one member and one other image")
    below = (members[:, None] < others[None]).double() + 0.5 * (members[:, None] == others[None]).double()
    return below.mean().item()


CHUNK = 100


def nearest(queries: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance float32 [M] to the nearest of the references [N, ...], and its index int64 [M].

    ``queries`` [M, ...] are of the same shape per row; any dtype, compared in float32.
    """
    y = references.flatten(1).float()
    minima = [torch.cdist(x.flatten(1).float(), y).min(1) for x in queries.split(CHUNK)]  # type: ignore[no-untyped-call]
    return torch.cat([part.values for part in minima]), torch.cat([part.indices for part in minima])


def isolation(index: Tensor, references: Tensor) -> Tensor:
    """Distance float32 [K] of each of the references numbered ``index`` [K] to the nearest other one."""
    y = references.flatten(1).float()
    distances = torch.cdist(y[index], y)
    distances[torch.arange(len(index)), index] = torch.inf
    return distances.min(1).values


def reproduces(drawn: Sequence[Tensor], training: Sequence[Tensor], index: Tensor) -> Tensor:
    """Detect reproduced training images: bool [M], true if drawn image i reproduces training image ``index[i]``.

    It does if, in every view, that image is the nearest of all training images, and nearer to the drawn image than to
    any other training image. Views are ways to look at an image: its pixels, a classifier's features of it; ``drawn``
    has [M, ...] and ``training`` [N, ...] of each. The limit is thus each image's own: one with near-copies among the
    training images is reproduced by less than one that stands alone (as the ratio in Carlini et al. 2023, section 4.2).
    The training images must differ from each other.

    Raises:
        ValueError: There is no view, or the views of both sides do not match.
    """
    if not drawn or len(drawn) != len(training):
        raise ValueError(f"give at least one view of both sides, got {len(drawn)} and {len(training)}")
    again = torch.ones(len(index), dtype=torch.bool)
    for queries, references in zip(drawn, training, strict=True):
        distance, nearest_index = nearest(queries, references)
        unique, inverse = index.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        again &= (nearest_index == index) & (distance < isolation(unique, references)[inverse])
    return again

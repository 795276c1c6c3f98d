"""Which weights matter to what is forgotten: SalUn's mask, one bit per weight (Fan et al. 2023, arXiv 2310.12508)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from erasediff.objectives import Batch, DenoisingObjective
from erasediff.process import NoiseRole, noise_key
from erasediff_kernels import ConstrainedAdamW, ConstrainedSGD, pack_mask

EXPONENT_BITS = 16
"""A magnitude's upper half: sign, exponent and seven bits of mantissa, a step of less than 1%."""


def forget_gradients(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    objective: DenoisingObjective,
    batches: Iterable[Batch],
    *,
    seed: int = 0,
) -> list[Tensor]:
    """Gradients, summed over ``batches`` of forgotten data, of the loss that the model was trained with.

    The quantity of SalUn's eq. 3, at the original weights. Noise and timesteps are addressed by (seed, number of the
    batch). Gradients that ``parameters`` had are lost. One tensor per parameter, zero where the loss does not reach.
    """
    device = parameters[0].device
    for parameter in parameters:
        parameter.grad = None
    for step, batch in enumerate(batches):
        objective.true_loss(
            model,
            batch,
            noise_key(seed, step, device),
            torch.autograd.backward,
            noise=NoiseRole.FORGET_NOISE,
            timestep=NoiseRole.FORGET_TIMESTEP,
        )
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients


def saliency_threshold(gradients: Sequence[Tensor], share: float) -> Tensor:
    """The magnitude, 0-D float32, that ``share`` of all elements reach: SalUn's gamma, exact, without sorting.

    Non-negative floats are ordered as their bits are. A count of their upper halves finds the bin that the threshold is
    in, and kthvalue runs on that bin alone: under a hundredth of the elements for any smooth distribution.

    Raises ``ValueError`` for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}: it must lie in (0, 1]")
    device = gradients[0].device
    counts = torch.zeros(1 << EXPONENT_BITS, dtype=torch.int64, device=device)
    for gradient in gradients:
        counts += torch.bincount(_upper_half(gradient), minlength=counts.numel())
    total = int(counts.sum())
    rank = total - max(1, round(share * total))
    cumulated = counts.cumsum(0)
    chosen = int(torch.searchsorted(cumulated, rank, right=True))
    before = int(cumulated[chosen - 1]) if chosen else 0
    inside = [_magnitude(gradient)[_upper_half(gradient) == chosen] for gradient in gradients]
    return torch.cat(inside).kthvalue(rank - before + 1).values


def set_saliency_mask(
    optimizer: ConstrainedAdamW | ConstrainedSGD,
    parameters: Sequence[nn.Parameter],
    gradients: Sequence[Tensor],
    *,
    share: float = 0.5,
) -> float:
    """Let ``optimizer`` move only the ``share`` of weights whose gradient is largest; returns the share that moves.

    SalUn's default is one half, its gamma the median of the magnitudes. Equal magnitudes stand or fall together.
    """
    threshold = saliency_threshold(gradients, share)
    moving = torch.zeros((), dtype=torch.int64, device=threshold.device)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        mask = torch.empty_like(parameter, dtype=torch.bool).copy_(gradient.abs().float() >= threshold)
        moving += mask.sum()
        optimizer.set_mask(parameter, pack_mask(mask))
    return int(moving) / sum(parameter.numel() for parameter in parameters)


def _magnitude(gradient: Tensor) -> Tensor:
    return gradient.detach().abs().float().flatten()


def _upper_half(gradient: Tensor) -> Tensor:
    return _magnitude(gradient).view(torch.int32) >> EXPONENT_BITS

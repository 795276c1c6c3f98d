"""SalUn: relabelling that moves only the weights which matter to the forgotten data (arXiv 2310.12508)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from erasediff.config.fields import Count, Positive, Section, Share
from erasediff.diffusion.batch import Batch
from erasediff.diffusion.rng import NoiseRole, noise_key
from erasediff.errors import UserError
from erasediff.methods.barriers import Fixed
from erasediff.methods.base import Solver
from erasediff.methods.erasediff import EraseDiff
from erasediff.methods.spec import (
    FORGET_KEYS,
    RETAIN_KEYS,
    SOLVER_KEYS,
    UNTIL_KEYS,
    BuildContext,
    MethodSpec,
    Requirements,
)
from erasediff.parallel.gradient_store import GradientStore

HALF_BITS = 16
"""A magnitude's upper half: sign, exponent and seven bits of mantissa, a step of less than 1%."""
HALF_MASK = (1 << HALF_BITS) - 1


def forget_gradients(method: Solver, batches: Iterable[Batch]) -> list[Tensor]:
    """Sum the gradient of the loss that the model was trained with over batches of forgotten data (SalUn, eq. 3).

    It is taken at the weights as they are, without min-SNR weights or antithetic timesteps; noise and timesteps are
    addressed by (seed, number of the batch).

    Args:
        method: whose model, gradient store and seed are used; nothing of it changes.
        batches: of forgotten data.

    Returns:
        This process's share: one tensor for each of ``method.gradients.weights()``, zero where the loss does not reach.

    Raises:
        ValueError: without a batch.
    """
    objective = dataclasses.replace(method.objective, min_snr_gamma=None, antithetic=False)
    total: list[Tensor] = []
    for step, batch in enumerate(batches):
        loss = partial(
            objective.denoising_loss,
            method.model,
            key=noise_key(method.seed, step, method.device),
            noise=NoiseRole.FORGET_NOISE,
            timestep=NoiseRole.FORGET_TIMESTEP,
        )
        _, gradient = method.loss_and_gradient(batch, loss)
        if total:
            torch._foreach_add_(total, gradient)
            method.gradients.release(gradient)
        else:
            total = gradient
    if not total:
        raise ValueError("saliency needs at least one batch of forgotten data")
    return total


def saliency_threshold(
    gradients: Sequence[Tensor],
    share: float,
    *,
    count: int | None = None,
    summed: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> Tensor:
    """The magnitude, 0-D float32, that ``share`` of all elements reach: SalUn's gamma, exact, without sorting.

    Non-negative floats are ordered as their bits are. A count of their upper halves finds the bin that the threshold is
    in, and one of the lower halves in that bin finds it: all that shards exchange is two counts of 65,536 bins.

    Args:
        gradients: this process's share, any shapes and floating dtypes.
        share: of the elements, in (0, 1].
        count: how many elements there are; more in ``gradients``, which must be zero, are padding. None: all of them.
        summed: from this process's counts to those of all elements, where ``gradients`` are a shard.

    Raises:
        ValueError: for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}: it must lie in (0, 1]")
    # From the top: padding lies below everything.
    rank = max(1, round(share * (sum(gradient.numel() for gradient in gradients) if count is None else count)))
    upper, above = _bin_of(summed(_counted(bits >> HALF_BITS for bits in map(_bits, gradients))), rank)
    inside = (bits[bits >> HALF_BITS == upper] & HALF_MASK for bits in map(_bits, gradients))
    lower, _ = _bin_of(summed(_counted(inside)), rank - above)
    return torch.tensor(upper << HALF_BITS | lower, dtype=torch.int32, device=gradients[0].device).view(torch.float32)


def set_saliency_mask(gradients: GradientStore, values: Sequence[Tensor], *, share: float = 0.5) -> float:
    """Let the optimizer move only the weights whose gradients are largest.

    SalUn's default is one half, its gamma the median of the magnitudes. Equal magnitudes stand or fall together.

    Args:
        gradients: the store of the model's gradients.
        values: as ``forget_gradients`` returns them.
        share: of the weights that moves, in (0, 1].

    Returns:
        The share that moves indeed.
    """
    device = gradients.device

    def summed(counts: Tensor) -> Tensor:
        return gradients.world.sum(counts.to(device)) // gradients.replicas

    local_count = sum(shard.tensors["weight"].numel() for shard in gradients.shards())
    count = int(summed(torch.tensor(local_count)))
    threshold = saliency_threshold(values, share, count=count, summed=summed)
    masks = [value.abs().float() >= threshold for value in values]
    gradients.set_masks(masks)
    padding = sum(value.numel() for value in values) - local_count
    moving = sum((mask.sum() for mask in masks), torch.zeros((), dtype=torch.int64, device=threshold.device))
    # Padding is free to move where the threshold is zero.
    moving = moving - padding * (threshold == 0).to(torch.int64)
    return int(summed(moving)) / count


def _bits(gradient: Tensor) -> Tensor:
    """int32: the bits of the magnitudes as float32."""
    return gradient.detach().abs().float().flatten().view(torch.int32)


def _counted(parts: Iterable[Tensor]) -> Tensor:
    """int64 [65536]: how often each number occurs."""
    return sum(torch.bincount(part, minlength=1 << HALF_BITS) for part in parts)  # type: ignore[return-value]


def _bin_of(counts: Tensor, rank: int) -> tuple[int, int]:
    """(the bin of the ``rank``-th largest element, how many elements are in larger bins)."""
    from_the_top = counts.flip(0).cumsum(0)
    index = int(torch.searchsorted(from_the_top, rank))
    return len(counts) - 1 - index, int(from_the_top[index - 1]) if index else 0


class SalUn(EraseDiff):
    """Descent on alpha L_r + E | eps(x_t | c') - eps(x_t | c) |^2 under a saliency mask (2310.12508, eq. 5 and 7).

    It is EraseDiff's step with a ``Relabel`` target and a constant multiplier 1 / alpha: the same direction, of another
    length, which Adam does not notice. The mask is the optimizer's (``set_saliency_mask``): weights without their bit
    have no part in the step.
    """

    name = "salun"


class SalunConfig(Section):
    """Settings of SalUn.

    Attributes:
        retain_weight: alpha, 0.1 in the published Stable Diffusion recipe.
        share: of the weights, those whose gradients are largest on forgotten data, which alone move.
        batches: forgotten batches that the gradients are measured on.
    """

    retain_weight: Positive = 0.1
    share: Share = 0.5
    batches: Count = 8


def build(context: BuildContext) -> SalUn:
    config = context.config
    settings = config.section(SalunConfig)
    if config.unlearn.target not in (None, "relabel"):
        raise UserError(f"SalUn's target is relabel, not {config.unlearn.target}: omit --target.")
    if config.text_to_image.saliency is not None or config.text_to_image.train == "lora":
        raise UserError(
            "SalUn chooses among the model's own weights: set salun.share, not text_to_image.saliency, and no LoRA."
        )
    method = SalUn(
        context.network,
        context.optimizer,
        process=context.process,
        barrier=Fixed(1 / settings.retain_weight),
        target=context.relabel(),
        **context.options,
    )
    keep_to_the_salient(method, context.forget_batches(settings.batches), share=settings.share)
    return method


def keep_to_the_salient(method: Solver, batches: Iterable[Batch], *, share: float) -> None:
    """Let ``method`` move only the ``share`` of weights that matter most to ``batches`` of forgotten data."""
    set_saliency_mask(method.gradients, forget_gradients(method, batches), share=share)


SPEC = MethodSpec(
    name="salun",
    summary="relabelling under a saliency mask (SalUn, arXiv 2310.12508)",
    config=SalunConfig,
    reads=lambda _: SOLVER_KEYS | UNTIL_KEYS | RETAIN_KEYS | FORGET_KEYS | {"target", "relabel_to", "teacher"},
    needs=lambda config: Requirements(
        teacher=config.unlearn.teacher == "frozen", relabel=True, batches=config.section(SalunConfig).batches
    ),
    build=build,
)

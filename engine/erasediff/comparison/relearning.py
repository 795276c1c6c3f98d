"""How fast what was forgotten comes back when a few images of it are trained on again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from erasediff.methods import FineTune
from erasediff.objectives import Denoiser, diffusers_denoiser
from erasediff.process import Process
from erasediff.runs.loop import Batches
from erasediff_kernels import ConstrainedAdamW


def relearning_curve(
    network: nn.Module,
    process: Process,
    batches: Batches,
    measure: Callable[[], float],
    *,
    steps: Sequence[int],
    lr: float,
    denoiser: Denoiser = diffusers_denoiser,
    seed: int = 0,
) -> list[tuple[int, float]]:
    """(step, ``measure()``) before training and after each of ``steps``, ascending, of fine-tuning on ``batches``.

    All weights are trained, by AdamW at a constant ``lr``, without averaging: an attacker who has the weights and some
    images. What is slow to return was not merely hidden; the curve of a model that never saw the images is what slow
    means. ``network`` is changed.
    """
    if list(steps) != sorted(set(steps)) or not steps or steps[0] < 1:
        raise ValueError(f"steps must be positive and ascending, got {list(steps)}")
    optimizer = ConstrainedAdamW(network.parameters(), lr)
    method = FineTune(network, optimizer, process=process, denoiser=denoiser, seed=seed)
    curve = [(0, measure())]
    for step in range(steps[-1]):
        method.step(batches.at(step))
        if step + 1 in steps:
            curve.append((step + 1, measure()))
    return curve

"""Does a model reproduce images that it was trained on?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 100


def nearest(queries: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance float32 [M] to the nearest of the references [N, ...], and its index int64 [M].

    ``queries`` [M, ...] are of the same shape per row; any dtype, compared in float32.
    """
    y = references.flatten(1).float()
    found = [torch.cdist(x.flatten(1).float(), y).min(1) for x in queries.split(CHUNK)]  # type: ignore[no-untyped-call]
    return torch.cat([pair.values for pair in found]), torch.cat([pair.indices for pair in found])


def isolation(index: Tensor, references: Tensor) -> Tensor:
    """float32 [K]: how far each of the references numbered ``index`` [K] is from the nearest other one."""
    y = references.flatten(1).float()
    distances = torch.cdist(y[index], y)
    distances[torch.arange(len(index)), index] = torch.inf
    return distances.min(1).values


def reproduces(drawn: Sequence[Tensor], training: Sequence[Tensor], index: Tensor) -> Tensor:
    """bool [M]: whether drawn image i is training image ``index[i]`` again.

    It is if, in every view, that image is the nearest of all training images, and nearer to the drawn image than to any
    other training image. Views are ways to look at an image: its pixels, a classifier's features of it; ``drawn`` has
    [M, ...] and ``training`` [N, ...] of each. The limit is thus each image's own: one with near-copies among the
    training images is reproduced by less than one that stands alone (as the ratio in Carlini et al. 2023, section 4.2).
    The training images must differ from each other.

    Raises ``ValueError`` without a view, or for views that do not go together.
    """
    if not drawn or len(drawn) != len(training):
        raise ValueError(f"give at least one view of both sides, got {len(drawn)} and {len(training)}")
    again = torch.ones(len(index), dtype=torch.bool)
    for queries, references in zip(drawn, training, strict=True):
        distance, found = nearest(queries, references)
        wanted, place = index.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        again &= (found == index) & (distance < isolation(wanted, references)[place])
    return again

"""Mean activations of each concept at each place, and what lies between two of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from erasediff.errors import UserError
from erasediff.sae.activations import ActivationCache


@dataclass(frozen=True, slots=True)
class MeanMaps:
    """``mean`` float16 [bins, concepts, patches, d], over the images of a concept at a timestep.

    ``size`` is (h, w) of the block's maps, with h w patches, or () where its output is a sequence.
    """

    mean: Tensor
    size: tuple[int, ...]

    def nearest(self, concepts: Sequence[int]) -> tuple[int, ...]:
        """For each of the concepts, which of all others is nearest, over all timesteps and places."""
        left = [number for number in range(self.mean.shape[1]) if number not in concepts]
        return tuple(min(left, key=lambda other, own=own: self._distance(own, other)) for own in concepts)  # type: ignore[misc]

    def _distance(self, one: int, other: int) -> float:
        return (self.mean[:, one].float() - self.mean[:, other].float()).square().sum().item()

    def moves(self, concepts: Sequence[int], anchors: Sequence[int]) -> Tensor:
        """float32 [bins, concepts, patches, d]: from the mean of each of ``concepts`` to that of its anchor."""
        return self.mean[:, list(anchors)].float() - self.mean[:, list(concepts)].float()


def at_size(moves: Tensor, size: tuple[int, ...], x: Tensor) -> Tensor:
    """``moves`` [concepts, patches, d] between maps of ``size`` for the block's output ``x``.

    For maps [B, C, h, w] of another size, they are interpolated. UserError for sequences of another length, in which a
    place has no name.
    """
    if x.dim() == 4 and tuple(x.shape[2:]) != size:
        maps = moves.transpose(1, 2).unflatten(2, size)  # type: ignore[no-untyped-call]
        resized = torch.nn.functional.interpolate(maps, size=x.shape[2:], mode="bilinear", antialias=True)
        return resized.flatten(2).transpose(1, 2)
    if x.dim() == 3 and x.shape[1] != moves.shape[1]:
        raise UserError(
            f"The concepts were learned on {moves.shape[1]} patches and this image has {x.shape[1]}: "
            "draw it in the size of the activations, or set another saemnesia.intervention than move."
        )
    return moves


@torch.no_grad()
def measure_maps(cache: ActivationCache, timesteps: Tensor, concepts: int) -> MeanMaps:
    """Over the whole cache, summed in fp64; ``timesteps`` int64 [bins] as in ``Features``."""
    total, count = None, torch.zeros(concepts, dtype=torch.float64)
    for shard in range(len(cache.shards)):
        x, concept, steps, _ = cache.images(shard)
        place = (steps == timesteps[:, None]).int().argmax(dim=1)
        x = x[:, place].double()
        if total is None:
            total = x.new_zeros(concepts, *x.shape[1:])
        total.index_add_(0, concept, x)
        count.index_add_(0, concept, torch.ones_like(concept, dtype=torch.float64))
    if total is None:
        raise ValueError("the cache holds no shard")
    mean = total / count.clamp_min(1)[:, None, None, None]
    return MeanMaps(mean.transpose(0, 1).half().contiguous(), cache.map_size())

"""How far each tensor of a checkpoint moved from the checkpoint that it was trained from."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch

from erasediff.io.tensor_file import StoredTensor
from erasediff.models.checkpoint.base import Checkpoint, canonical_name, has, weighted_components

Named = dict[str, StoredTensor]


@dataclass(frozen=True, slots=True)
class Move:
    """Distance of a trained tensor w from the original w_0.

    Attributes:
        l2: |w - w_0|.
        relative_l2: |w - w_0| / |w_0|; None where w_0 is zero.
        max: The largest |w_i - w_0i|.
    """

    l2: float | None
    relative_l2: float | None
    max: float | None


@torch.no_grad()
def measure_moves(base: Checkpoint, output: Checkpoint) -> dict[str, Any]:
    """Compare two checkpoints of any layouts tensor by tensor, with one pair per thread in memory.

    Tensors are matched by their names in a diffusers folder, and compared by value: one that is only stored in another
    dtype has not moved.

    Returns:
        JSON: ``moved`` (a ``Move`` for each tensor that moved, as "component.name"), ``unmoved`` (number of the
        others), ``added`` and ``removed`` (tensors that only one of the two has, or whose sizes differ), ``l2`` over
        all.

    Raises:
        UserError: A checkpoint is damaged.
    """
    before, after = dict(_tensors(base)), dict(_tensors(output))
    shared = [name for name in sorted(after) if name in before and _fit(before[name], after[name])]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        moves = dict(zip(shared, pool.map(lambda name: _move(before[name], after[name]), shared), strict=True))
    moved = {name: asdict(move) for name, move in moves.items() if move is not None}
    norms = [move.l2 for move in moves.values() if move is not None]
    finite = [norm for norm in norms if norm is not None]
    return {
        "moved": moved,
        "unmoved": len(moves) - len(moved),
        "added": sorted(after.keys() - moves.keys()),
        "removed": sorted(before.keys() - moves.keys()),
        "l2": math.hypot(*finite) if len(finite) == len(norms) else None,
    }


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, StoredTensor]]:
    for component in weighted_components(checkpoint):
        if has(checkpoint, component):
            for name, tensor in checkpoint.tensors(component).items():
                yield f"{component}.{canonical_name(name)}", tensor


def _fit(before: StoredTensor, after: StoredTensor) -> bool:
    # Attention of old autoencoders is stored as convolutions of one pixel.
    return math.prod(before.shape) == math.prod(after.shape)


def _move(before: StoredTensor, after: StoredTensor) -> Move | None:
    """Distance of two tensors of the same size; None for equal ones."""
    old, new = before.load().reshape(-1), after.load().reshape(-1)
    if old.dtype == new.dtype and torch.equal(old, new):
        return None
    wide = torch.float64 if torch.float64 in (old.dtype, new.dtype) or not new.is_floating_point() else torch.float32
    old, new = old.to(wide), new.to(wide)
    if torch.equal(old, new):
        return None
    # Differences are exact to an ulp on any machine, and so are sums in float64: a receipt is checked on another one.
    difference = new - old
    length, start = (float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (difference, old))
    largest = float(difference.abs().max())
    return Move(_finite(length), _finite(length / start) if start else None, _finite(largest))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

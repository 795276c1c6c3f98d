"""Agreement of all ranks to try a failed step again, before any of them begins it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from erasediff.parallel.world import World

RETRY_SECONDS = 60.0
"""Seconds that a rank which failed waits for the others to fail as well."""

_attempts = 0
"""Retries of this process so far: the same number on each rank, or they are not at the same step."""


def agree_to_retry(world: World) -> None:
    """Wait until every rank has given up the same step at the same collective, and for the collectives under way.

    Ranks that raised together, each at the same point, can go on. A rank that raised alone cannot: the others are
    inside a collective that it never joined, and its next one would be taken for that. The ranks compare how many
    collectives each has begun, through the process group's key-value store, which needs no collective.

    Args:
        world: The ranks. A world of one agrees at once.

    Raises:
        RuntimeError: Another rank did not fail within ``RETRY_SECONDS``, or failed elsewhere. Ranks that wait in a
            collective meanwhile end with an error of their own when the process group's timeout is over, or as soon as
            this process exits.
    """
    global _attempts
    if world.size == 1:
        return
    _attempts += 1
    store = PrefixStore(f"erasediff-retry-{_attempts}", dist.distributed_c10d._get_default_store())
    begun = _collectives_begun()
    store.set(str(world.rank), begun)
    ranks = [str(rank) for rank in range(world.size)]
    try:
        store.wait(ranks, timedelta(seconds=RETRY_SECONDS))
    except RuntimeError:
        raise RuntimeError(_refusal(world, [rank for rank in ranks if not store.check([rank])])) from None
    elsewhere = [rank for rank in ranks if _read(store, rank) != begun]
    if elsewhere:
        raise RuntimeError(_refusal(world, elsewhere))
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    # Gloo's waits for all that its group has begun before.
    for group in dist.distributed_c10d._world.pg_map:
        dist.barrier(group)


def _collectives_begun() -> str:
    """By process group, in the order in which the groups were made."""
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    return " ".join(str(group._get_sequence_number_for_group()) for group in groups)


def _read(store: Store, key: str) -> str:
    content: bytes = store.get(key)
    return content.decode()


def _refusal(world: World, others: list[str]) -> str:
    return (
        f"rank {world.rank} failed in a step in which rank {', '.join(others)} did not fail, or failed elsewhere: "
        "end all processes and resume from the last checkpoint"
    )

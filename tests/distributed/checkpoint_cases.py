"""Jobs of the processes in the tests of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from cases import take_steps, unlearner

from erasediff.errors import UserError
from erasediff.parallel.control_plane import ControlPlane
from erasediff.training.checkpoint import Checkpoint, snapshot_of

_peers: dict[int, ControlPlane] = {}


def peers() -> ControlPlane:
    """The group's ranks, over the store that it began with."""
    size = dist.get_world_size()
    if size not in _peers:
        store = dist.distributed_c10d._get_default_store()
        # This module may be there twice, under two names: the keys of one are not to be the other's.
        ControlPlane._current = _peers[size] = ControlPlane(dist.PrefixStore(__name__, store), dist.get_rank(), size)
        _peers[size].seconds = 60
    return _peers[size]


def go_on(run: str, first: int, last: int, options: dict[str, Any]) -> list[dict[str, float]]:
    """The reports of steps ``first`` to ``last``, from one checkpoint of ``run`` to the next."""
    peers()
    method = unlearner(**options)
    snapshot = snapshot_of(method, method.model, shared=options["layout"] != "local")
    if first:
        snapshot.restore(Checkpoint(first, Path(run, f"checkpoint-{first}")))
        assert method.iteration == first
    reports = take_steps(method, range(first, last))
    snapshot.save(Checkpoint(last, Path(run, f"checkpoint-{last}")))
    return reports


def restore_error(run: str, step: int, options: dict[str, Any]) -> str:
    """Error of a rank that restores a checkpoint."""
    peers()
    method = unlearner(**options)
    try:
        snapshot_of(method, method.model, shared=True).restore(Checkpoint(step, Path(run, f"checkpoint-{step}")))
    except UserError as error:
        return str(error)
    return "restored"


def save_where_one_rank_cannot(run: str, step: int, options: dict[str, Any]) -> str:
    """Error of a rank while the disk of the last one is full."""
    method, mine = unlearner(**options), peers()
    snapshot = snapshot_of(method, method.model, shared=True)
    import erasediff.training.checkpoint as module

    save_state = module.save_state

    def full(state: Any, path: Path) -> None:
        raise OSError(28, "No space left on device")

    if mine.rank == mine.size - 1:
        module.save_state = full
    try:
        snapshot.save(Checkpoint(step, Path(run, f"checkpoint-{step}")))
    except UserError as error:
        return str(error)
    finally:
        module.save_state = save_state
    return "saved"

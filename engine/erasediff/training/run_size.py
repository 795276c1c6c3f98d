"""Estimate of the bytes that a run writes: its model and as many checkpoints as there are at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from erasediff.config import Config, TrainConfig, UnlearnConfig
from erasediff.io.disk_room import check_room, check_writable
from erasediff.parallel.control_plane import ControlPlane

FLOAT_BYTES = 4


def run_bytes(
    config: Config,
    settings: TrainConfig | UnlearnConfig,
    network: nn.Module,
    trained: Iterable[nn.Parameter],
    model_bytes: int | None = None,
) -> int:
    """Estimate the bytes that a run takes on the disk at most.

    Args:
        config: Sections ``run`` and ``distributed``.
        settings: Steps, moments and average.
        network: Network, whole; its parameters may be empty.
        trained: Its trained parameters.
        model_bytes: Bytes of the saved model; None for those of the network.

    Returns:
        The model, the checkpoints to keep and the one that is written before the oldest goes; among several ranks also
        the whole network, gathered in a file.
    """
    network_bytes = sum(parameter.nbytes for parameter in network.parameters())
    moments = 2 if isinstance(settings, UnlearnConfig) and settings.moments == "8-bit" else 2 * FLOAT_BYTES
    average = 0 if settings.ema_decay is None else FLOAT_BYTES
    state = sum(p.numel() * (p.dtype.itemsize + moments + average) for p in trained)
    checkpoints = min(config.run.keep_checkpoints + 1, -(-(settings.steps or 0) // config.run.checkpoint_every))
    gathered = 0 if config.distributed.launch == "none" else network_bytes
    return (network_bytes if model_bytes is None else model_bytes) + gathered + checkpoints * state


def check_storage(out: Path, size: int) -> None:
    """Check, on the main rank, that a run of ``size`` bytes can be written to ``out``, counting what is there already.

    Raises:
        UserError: There is no right to write, or no room.
    """
    if not ControlPlane.current().is_main:
        return
    check_writable(out)
    present = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) if out.is_dir() else 0
    check_room(out, max(0, size - present), "The model and the checkpoints of this run")

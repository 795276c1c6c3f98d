"""Process group initialisation from a launcher's environment, and the device and batch share of each rank."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TypedDict

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from erasediff.config import DistributedConfig, check_shares
from erasediff.errors import UserError
from erasediff.parallel.control_plane import ControlPlane


class Share(TypedDict):
    """Part of every batch that this rank takes, as keywords of the batches.

    Attributes:
        rank: Rank of this process.
        world_size: Number of ranks.
    """

    rank: int
    world_size: int


def check_launch(settings: DistributedConfig) -> None:
    """Check that a launcher and the configuration agree on the number of processes.

    Raises:
        UserError: Several processes were started for ``launch: none``, or one for another launch mode.
    """
    size = ControlPlane.current().size
    if settings.launch == "none" and size > 1:
        raise UserError(f"{size} processes were started: say with --launch ddp, fsdp or zero how they share the work.")
    if settings.launch != "none" and ControlPlane.current().store is None:
        raise UserError("This command runs in one process: leave distributed.launch at none.")


def local_device(name: str, launch: str) -> str:
    """Choose the device of this rank.

    Args:
        name: Device of the configuration: "auto", "cpu", "cuda" or "cuda:N".
        launch: Launch mode; with "none", ``name`` is kept.

    Returns:
        Name of a device, with the number of this rank's own GPU.

    Raises:
        UserError: Several ranks would share a GPU.
    """
    if launch == "none":
        return name
    if name.startswith("cuda:"):
        raise UserError(f"Each process has a GPU of its own: say --device cuda, not {name}.")
    if name not in ("auto", "cuda"):
        return name
    gpus, place = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if name == "auto" and gpus == 0:
        return "cpu"
    if place >= gpus:
        found = f"{gpus} GPU" if gpus == 1 else f"{gpus} GPUs"
        raise UserError(f"This machine has {found}, and process {place + 1} needs one of its own: say --device cpu.")
    return f"cuda:{place}"


def join(settings: DistributedConfig, device: torch.device) -> None:
    """Initialise ``torch.distributed`` among the ranks; a second call does nothing.

    Args:
        settings: Launch mode, and the seconds that ranks wait for one another.
        device: Device of this rank: NCCL reduces what is on a GPU, gloo what is on the CPU.
    """
    peers = ControlPlane.current()
    if settings.launch == "none" or peers.store is None or dist.is_initialized():
        return
    peers.seconds = settings.timeout
    if settings.launch == "zero":
        os.environ.setdefault("DS_ACCELERATOR", device.type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        # Collectives of both kinds of tensors: stops are agreed on without the device.
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("group", peers.store),
        rank=peers.rank,
        world_size=peers.size,
        timeout=timedelta(seconds=settings.timeout),
    )


def share_of(batch_size: int, setting: str) -> Share:
    """Part of a batch that this rank takes.

    Args:
        batch_size: Samples of the global batch.
        setting: Dotted name of the setting that it comes from, for the error.

    Raises:
        UserError: The ranks cannot share the batch evenly.
    """
    peers = ControlPlane.current()
    check_shares(batch_size, setting, peers.size)
    return Share(rank=peers.rank, world_size=peers.size)

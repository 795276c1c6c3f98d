"""Checks of settings that processes share, before any of them is started."""

from erasediff.config.schema import DistributedConfig
from erasediff.errors import UserError


def check_offload(settings: DistributedConfig) -> None:
    """Raise UserError for offloading that the launch mode does not support."""
    launch = settings.launch
    if settings.offload_params and launch not in ("fsdp", "zero"):
        raise UserError(f"--launch {launch} keeps parameters on every device: use fsdp, or zero --stage 3.")
    if settings.offload_optimizer and launch in ("none", "ddp"):
        raise UserError(f"--launch {launch} cannot offload its optimizer: use fsdp or zero.")
    if launch == "fsdp" and settings.offload_optimizer and not settings.offload_params:
        raise UserError("FSDP offloads optimizer and parameters together: ask for both, --offload params.")


def check_shares(batch_size: int, setting: str, processes: int) -> None:
    """Raise UserError for a batch that ``processes`` cannot share evenly."""
    if batch_size % processes:
        raise UserError(f"{setting} is {batch_size}, which {processes} processes cannot share: choose a multiple.")

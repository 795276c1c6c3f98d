"""Settings of parallelism, and the checks that need no process group."""

from pathlib import Path
from typing import Literal

from erasediff.config.fields import Count, Positive, Section
from erasediff.errors import UserError


class DistributedConfig(Section):
    """Parallelism: one process per device, each with its slice of every batch; the result is that of one process.

    Attributes:
        launch: "none" is one process; "ddp" replicates the whole state; "fsdp" shards parameters, gradients and
            optimizer state (FSDP2); "zero" is DeepSpeed at ``stage``.
        stage: ZeRO stage: 0 shards nothing, 1 the optimizer's state, 2 gradients too, 3 parameters too; None is that of
            ``deepspeed_config``, or 2.
        processes: Number on this machine; if it is not set and there are GPUs, one for each of them. Under torchrun,
            deepspeed or accelerate launch, as many as these started.
        offload_optimizer: Keep the optimizer's state, and take its step, on the CPU.
        offload_params: Keep parameters on the CPU while they are not used (ZeRO 3 and FSDP).
        deepspeed_config: A DeepSpeed configuration file; what it omits or sets to "auto" follows the other settings.
        own_reduction: Reduce gradients and gather weights of ZeRO by erasediff's code, which overlaps and copies less;
            false for DeepSpeed's own.
        timeout: Seconds that ranks wait for one another before the run ends with an error.
    """

    launch: Literal["none", "ddp", "fsdp", "zero"] = "none"
    stage: Literal[0, 1, 2, 3] | None = None
    processes: Count = 1
    offload_optimizer: bool = False
    offload_params: bool = False
    deepspeed_config: Path | None = None
    own_reduction: bool = True
    timeout: Positive = 600.0


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

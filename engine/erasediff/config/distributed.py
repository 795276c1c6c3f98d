"""How a run is spread over processes."""

from pathlib import Path
from typing import Literal

from erasediff.config.fields import Count, Positive, Section
from erasediff.errors import UserError


class DistributedConfig(Section):
    """One process per device, each with its slice of every batch: the result is that of one process.

    launch:            "none" is one process; "ddp" has the whole state on every rank; "fsdp" shards parameters,
                       gradients and optimizer state (FSDP2); "zero" is DeepSpeed at ``stage``
    stage:             of ZeRO: 0 shards nothing, 1 the optimizer's state, 2 gradients too, 3 parameters too; None is
                       that of ``deepspeed_config``, or 2
    processes:         on this machine; under torchrun, deepspeed or accelerate launch, what they started
    offload_optimizer: its state and its step live on the CPU
    offload_params:    parameters rest on the CPU (ZeRO 3 and FSDP)
    deepspeed_config:  a DeepSpeed JSON of one's own; what it leaves open, or to "auto", is as for the other settings
    timeout:           seconds that ranks wait for one another before the run ends with an error
    """

    launch: Literal["none", "ddp", "fsdp", "zero"] = "none"
    stage: Literal[0, 1, 2, 3] | None = None
    processes: Count = 1
    offload_optimizer: bool = False
    offload_params: bool = False
    deepspeed_config: Path | None = None
    timeout: Positive = 600.0


def check_offload(settings: DistributedConfig) -> None:
    """UserError where what is to be offloaded does not go with how the run is launched."""
    launch = settings.launch
    if settings.offload_params and launch not in ("fsdp", "zero"):
        raise UserError(f"--launch {launch} keeps parameters on every device: use fsdp, or zero --stage 3.")
    if settings.offload_optimizer and launch in ("none", "ddp"):
        raise UserError(f"--launch {launch} cannot offload its optimizer: use fsdp or zero.")
    if launch == "fsdp" and settings.offload_optimizer and not settings.offload_params:
        raise UserError("FSDP offloads optimizer and parameters together: ask for both, --offload params.")


def check_shares(batch_size: int, setting: str, processes: int) -> None:
    """UserError for a batch that ``processes`` cannot share evenly."""
    if batch_size % processes:
        raise UserError(f"{setting} is {batch_size}, which {processes} processes cannot share: choose a multiple.")

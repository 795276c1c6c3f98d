"""How a run is spread over processes."""

from pathlib import Path
from typing import Literal

from erasediff.config.fields import Count, Positive, Section


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

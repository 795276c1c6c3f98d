"""Parameters that ZeRO-3 cuts, one by one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn


def gathered(*parameters: Tensor) -> AbstractContextManager[object]:
    """Those of ``parameters`` that ZeRO-3 has partitioned are whole within the block, on each process."""
    cut = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not cut:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(cut)  # type: ignore[no-any-return]


def partitioner(config: dict[str, Any]) -> Callable[[nn.Parameter], None]:
    """What cuts one whole parameter as ZeRO-3 under ``config`` does, with the first process's values.

    Every process must call it for the same parameters in the same order; the parameter's own storage is freed.
    """
    import deepspeed

    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config, mem_efficient_linear=False)
    return lambda parameter: init._convert_to_zero_parameters([parameter])

"""The sizes of DeepSpeed's buffers, from its JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from erasediff.distributed.zero_config import read_own
from erasediff.errors import UserError
from erasediff.planning.memory import Layout


def buckets_of(path: Path | None) -> Layout:
    """A layout of stage 0 that carries the buffer sizes in ``path``; DeepSpeed's defaults where it has none.

    UserError for a file that cannot be read, and for sizes that are no whole numbers ("auto" stands for the default).
    """
    zero: dict[str, Any] = {} if path is None else read_own(path).get("zero_optimization", {})
    default = Layout(stage=0)

    def size(name: str) -> int:
        value = zero.get(name, getattr(default, name))
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise UserError(f"{name} in {path} is {value!r}: it must be a whole number of elements.")
        return int(value)

    return Layout(
        stage=0,
        overlap_comm=zero.get("overlap_comm") is True,
        reduce_bucket_size=size("reduce_bucket_size"),
        stage3_prefetch_bucket_size=size("stage3_prefetch_bucket_size"),
        stage3_param_persistence_threshold=size("stage3_param_persistence_threshold"),
        stage3_max_reuse_distance=size("stage3_max_reuse_distance"),
        stage3_max_live_parameters=size("stage3_max_live_parameters"),
    )

"""Every name of DeepSpeed that its documentation does not promise, for the versions that they were tried with.

A layout is how an engine keeps what the optimizer updates. Its ``flats`` are the tensors of the optimizer's own groups:
this process's fp32 partitions (ZeRO 1-3), or whole parameters or their fp32 masters (stage 0). Its lists of gradients
have one tensor for each of them.
"""

from erasediff.gradients.deepspeed.choice import layout_of
from erasediff.gradients.deepspeed.engine import (
    autocast,
    check_engine,
    is_engine,
    return_boundary,
    take_over_clipping,
    tell_norm,
)
from erasediff.gradients.deepspeed.layout import Fragment, Layout
from erasediff.gradients.deepspeed.parameters import gathered, partitioner

__all__ = [
    "Fragment",
    "Layout",
    "autocast",
    "check_engine",
    "gathered",
    "is_engine",
    "layout_of",
    "partitioner",
    "return_boundary",
    "take_over_clipping",
    "tell_norm",
]

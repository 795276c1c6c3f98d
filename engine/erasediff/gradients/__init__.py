"""Where gradients live, and how an update reaches the weights."""

from erasediff.gradients.averages import averaged_weights
from erasediff.gradients.choice import gradients_for
from erasediff.gradients.data_parallel import DataParallelGradients
from erasediff.gradients.fully_sharded import FullyShardedGradients
from erasediff.gradients.loading import gather_in_forward, partition, partitioned_module
from erasediff.gradients.local import LocalGradients
from erasediff.gradients.protocol import Gradients, Shard
from erasediff.gradients.whole import full_weights
from erasediff.gradients.zero import ZeroGradients

__all__ = [
    "DataParallelGradients",
    "FullyShardedGradients",
    "Gradients",
    "LocalGradients",
    "Shard",
    "ZeroGradients",
    "averaged_weights",
    "full_weights",
    "gather_in_forward",
    "gradients_for",
    "partition",
    "partitioned_module",
]

"""What a training step costs before anyone has a GPU for it: memory per rank, FLOPs, and time at scale."""

from erasediff.planning.memory import Layout, Precision, RankMemory, rank_memory
from erasediff.planning.overview import Overview, Row, overview
from erasediff.planning.reference_models import Network, network_of
from erasediff.planning.trace import StepFlops, Trace, step_flops, trace

__all__ = [
    "Layout",
    "Network",
    "Overview",
    "Precision",
    "RankMemory",
    "Row",
    "StepFlops",
    "Trace",
    "network_of",
    "overview",
    "rank_memory",
    "step_flops",
    "trace",
]

"""Cost of a training step before it runs: memory per rank, FLOPs, and time at scale."""

from erasediff.planning.memory import Layout, RankMemory, rank_memory
from erasediff.planning.overview import Overview, Row, overview
from erasediff.planning.reference_models import Network, network_of
from erasediff.planning.step_plan import Pass, Precision, StepPlan
from erasediff.planning.trace import StepFlops, Trace, step_flops, trace

__all__ = [
    "Layout",
    "Network",
    "Overview",
    "Pass",
    "Precision",
    "RankMemory",
    "Row",
    "StepFlops",
    "StepPlan",
    "Trace",
    "network_of",
    "overview",
    "rank_memory",
    "step_flops",
    "trace",
]

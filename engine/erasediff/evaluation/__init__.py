"""Evaluation: sampling, a classifier of real images, metrics of unlearning and retention, attacks."""

from erasediff.evaluation.judge import NONE, Judge
from erasediff.evaluation.metrics import (
    ConditionalMetrics,
    UnconditionalMetrics,
    conditional_metrics,
    evaluation_labels,
    unconditional_metrics,
)
from erasediff.evaluation.sampling import sample_images

__all__ = [
    "NONE",
    "ConditionalMetrics",
    "Judge",
    "UnconditionalMetrics",
    "conditional_metrics",
    "evaluation_labels",
    "sample_images",
    "unconditional_metrics",
]

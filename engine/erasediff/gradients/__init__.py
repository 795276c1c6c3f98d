"""Where gradients live, and how an update reaches the weights."""

from erasediff.gradients.local import LocalGradients
from erasediff.gradients.protocol import Gradients

__all__ = ["Gradients", "LocalGradients"]

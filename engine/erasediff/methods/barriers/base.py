"""The interface of barriers: rules that combine the retain and the forget gradient from their Gram values.

The update is delta = a r + b g with r = grad L_r and g = grad L_f. A rule maps (|r|^2, <r,g>, |g|^2), and losses where
it needs them, to the two coefficients (a, b), all of them 0-D tensors on the device, so that no gradient is read twice
and no number is read on the host. Under sharding the Gram values are those of the whole model, so that every process
computes the same coefficients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from erasediff_kernels import Constraint, clip_combination, constraint_multiplier


class StepValues(NamedTuple):
    """The numbers that one step is decided by, of the global batch: on the device, the same on each process."""

    gram: Tensor
    """float64 [3] = (|r|^2, <r,g>, |g|^2)."""
    retain_loss: Tensor | None = None
    """L_r, 0-D float32; None for a method without it, as the following."""
    forget_loss: Tensor | None = None
    """L_f."""
    gap: Tensor | None = None
    """L_f(theta) - L_f(phi_K); None where no inner solve was run."""


class Barrier(ABC):
    """A rule from ``StepValues`` to the coefficients of delta = a r + b g; a subclass is one file of this package.

    Attributes:
        name: of the rule, that of its file.
        needs_inner_solve: whether ``StepValues.gap`` is to be computed for it.
    """

    __slots__ = ()
    name: ClassVar[str]
    needs_inner_solve: ClassVar[bool] = False

    @abstractmethod
    def coefficients(self, values: StepValues) -> tuple[Tensor, Tensor]:
        """The coefficients of the two gradients.

        Args:
            values: Gram values and losses of the global batch.

        Returns:
            (a, b), 0-D float64; both 0 for no step. Must not read on the host.
        """

    def constraint(self, values: StepValues, max_norm: float | None) -> Constraint:
        """Compute the update's coefficients, clip scale, norm before clipping, and whether all of it is finite.

        Args:
            values: Gram values and losses of the global batch.
            max_norm: the largest norm of delta; None leaves it as it is.
        """
        return clip_combination(values.gram, torch.stack(self.coefficients(values)), max_norm=max_norm)

    def advance(self, values: StepValues, finite: Tensor) -> None:  # noqa: B027
        """Update the rule's own state after a step, if it has any.

        Args:
            values: what the step was decided by.
            finite: 0-D bool, false where the step was skipped.
        """

    def scalars(self) -> dict[str, Tensor]:
        """The rule's state, 0-D tensors by name, the same on each process; most rules have none."""
        return {}

    def load_scalars(self, scalars: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Restore ``scalars``."""


class FusedBarrier(Barrier):
    """A rule that ``erasediff_kernels.constraint_multiplier`` knows by its name: one launch, clipping included.

    ``coefficients`` is the same rule in tensor operations.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def eta(self) -> float:
        """The rule's one number."""

    def constraint(self, values: StepValues, max_norm: float | None) -> Constraint:
        gap = values.gap if self.name == "gap" else None
        return constraint_multiplier(values.gram, self.name, self.eta, gap=gap, max_norm=max_norm)


def positive(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` is positive."""
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")

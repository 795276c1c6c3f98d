"""What one step tells, still on the device."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class StepReport(NamedTuple):
    """0-D tensors on the model's device; reading one synchronises, carrying it does not.

    A field is None where the method has no such quantity.
    """

    retain_loss: Tensor | None = None
    forget_loss: Tensor | None = None
    gap: Tensor | None = None
    multiplier: Tensor | None = None
    grad_norm: Tensor | None = None
    """|delta| before clipping."""
    finite: Tensor | None = None
    skipped: Tensor | None = None
    """Steps skipped so far, int64."""

    def scalars(self) -> dict[str, Tensor]:
        """The fields that this step has."""
        return {name: value for name, value in self._asdict().items() if value is not None}

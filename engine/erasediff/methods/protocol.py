"""What a training loop needs of a method."""

from __future__ import annotations

from typing import Any, Protocol

from erasediff.objectives import Batch
from erasediff.solver import StepReport


class Method(Protocol):
    """One step at a time, on the device, resumable."""

    @property
    def name(self) -> str: ...

    iteration: int
    """Steps taken so far."""

    def step(self, retain: Batch, forget: Batch) -> StepReport: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

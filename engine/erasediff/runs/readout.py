"""Device scalars kept as they are until someone must read them: then all at once, with one synchronisation."""

from typing import Any

import torch
from torch import Tensor


class Readout:
    """Collects the 0-D tensors of many steps; ``take`` reads them all in one transfer."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, dict[str, Tensor]]] = []

    def add(self, step: int, scalars: dict[str, Tensor]) -> None:
        """Remember the scalars of ``step`` without reading them."""
        self._steps.append((step, scalars))

    def take(self) -> list[dict[str, Any]]:
        """One record ``{"step": ..., name: number}`` for each step added since the last call."""
        tensors = [tensor for _, scalars in self._steps for tensor in scalars.values()]
        if not tensors:
            return []
        # float64 holds every float32, bool and step count exactly.
        numbers = iter(torch.stack([tensor.detach().to(torch.float64) for tensor in tensors]).tolist())
        records = [
            {"step": step} | {name: _plain(next(numbers), tensor.dtype) for name, tensor in scalars.items()}
            for step, scalars in self._steps
        ]
        self._steps.clear()
        return records


def _plain(number: float, dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return bool(number)
    return number if dtype.is_floating_point else int(number)

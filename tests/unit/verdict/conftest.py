"""A planted judge, which reads what an image shows from its first value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from erasediff.verdict.judges.base import UNKNOWN, Candidate

NOTHING = 255


class PlantedJudge:
    """An image shows the candidate whose number is its first value, or nothing where there is none."""

    name = "planted"

    def __init__(self, *, tells_apart: bool = True, blind: bool = False) -> None:
        self.tells_apart, self.blind = tells_apart, blind
        self.description: Mapping[str, Any] = {"kind": "planted"}

    def answers(self, images: Tensor, sought: Sequence[Candidate], others: Sequence[Candidate]) -> Tensor:
        count = len(sought) + len(others)
        shown = images[:, 0, 0, 0].long()
        return torch.full_like(shown, count - 1) if self.blind else torch.where(shown < count, shown, UNKNOWN)


@pytest.fixture
def showing() -> Callable[[Sequence[int]], Tensor]:
    """``showing(numbers)``: an image uint8 [3, 2, 2] for each, to the planted judge one of that candidate."""
    return lambda numbers: torch.tensor(numbers, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 2, 2)


@pytest.fixture
def planted() -> type[PlantedJudge]:
    return PlantedJudge

"""Candidates and images whose answer is known: plain red, green and blue."""

import pytest
import torch
from torch import Tensor

from erasediff.verdict.judges.base import Candidate

COLOURS = ("red", "green", "blue")


@pytest.fixture
def candidates() -> list[Candidate]:
    return [Candidate(name, name) for name in COLOURS]


@pytest.fixture
def plain_images() -> Tensor:
    """One image of each colour, uint8 [3, 3, 20, 20]."""
    return (255 * torch.eye(3, dtype=torch.uint8))[:, :, None, None].expand(-1, -1, 20, 20).contiguous()

"""FSDP2: weights are gathered once a step, in the precision of the passes; gradients are reduced in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

CASES = Path(__file__).with_name("fsdp_cases.py")
PADDING = 1.15
"""Rows of a parameter are cut evenly: of the smallest, up to one more for each rank."""


@pytest.mark.parametrize(
    ("autocast", "max_live_parameters", "at_least", "at_most"),
    [(None, 1 << 30, 4, 4), (None, 0, 12, 16), (torch.bfloat16, 1 << 30, 2, 2)],
)
def test_weights_are_gathered_once_a_step_in_the_precision_of_the_passes(
    run_on: Callable[..., list[Any]],
    autocast: torch.dtype | None,
    max_live_parameters: int,
    at_least: int,
    at_most: int,
) -> None:
    """A model that is too large to stay gathered is, in each direction of both passes; its root's rest stays."""
    for found in run_on(2, CASES, "communicated", autocast, max_live_parameters):
        assert at_least <= found.pop(("allgather", autocast or torch.float32)) <= at_most * PADDING
        assert 8 <= found.pop(("reduce_scatter", torch.float32)) <= 8 * PADDING
        assert not found


def test_a_rank_that_fails_alone_is_told_that_it_cannot_try_again(run_on: Callable[..., list[Any]]) -> None:
    *_, told = run_on(2, CASES, "alone", {"layout": "ddp"})
    assert "rank 1 failed in a step in which rank 0 did not fail" in told
    assert "resume from the last checkpoint" in told

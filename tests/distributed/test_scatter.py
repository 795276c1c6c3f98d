"""Each process ends with its part of the gradients' mean, in whatever order and number of passes they come."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from erasediff.parallel.world import World
from erasediff.parallel.zero.reduce_scatter import FlatReduceScatter, GradientScatter, PerParameterReduceScatter

HERE = Path(__file__)
SHAPES = [(3, 5), (1,), (40,), (2, 2, 2), (7,), (64,), (5, 1), (9,)]
GROUPS = [(0, 1, 2, 3, 4), (5, 6, 7)]
NEVER = 6
"""A parameter that no gradient comes in for."""
BUCKET = 50
"""One parameter is longer, most share theirs."""


def gradient_of(rank: int, index: int, micro_batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + 10 * index + micro_batch)
    return torch.randint(-8, 8, SHAPES[index], generator=generator).double()


def positions(processes: int) -> tuple[list[tuple[int, int, int]], list[int]]:
    """Parameters end to end with a gap of two after each third, and each group filled up to ``processes`` ranges."""
    places: list[tuple[int, int, int]] = []
    ranges = []
    for group, members in enumerate(GROUPS):
        at = 0
        for index in members:
            numel = SHAPES[index][0] if len(SHAPES[index]) == 1 else torch.Size(SHAPES[index]).numel()
            places.append((group, at, numel))
            at += numel + 2 * (index % 3 == 2)
        ranges.append(-(-at // processes) + 1)
    return places, ranges


def scattered(kind: str, dtype: torch.dtype, kept: torch.dtype, reduces: bool, passes: int) -> list[Tensor]:
    world = World.current()
    numels = [torch.Size(shape).numel() for shape in SHAPES]
    scatter: GradientScatter
    if kind == "parts":
        parts = PerParameterReduceScatter(numels, BUCKET, dtype, world.device)
        scatter, lengths = parts, [sum(parts.lengths)]
    else:
        places, lengths = positions(world.size)
        scatter = FlatReduceScatter(places, lengths, BUCKET, dtype, world.device)
    if reduces:
        type(scatter)._exchanges = False  # type: ignore[method-assign, assignment]
    scatter.add_buffers(torch.full((1000,), torch.nan, dtype=dtype, device=world.device))
    flats = [torch.full((length,), torch.nan, dtype=kept, device=world.device) for length in lengths]
    before = [flat.clone() for flat in flats]
    # A gradient before is still on its way when this one begins.
    for target in (before, flats):
        scatter.begin(target)
        for micro_batch in range(passes):
            order = range(len(SHAPES)) if micro_batch % 2 else reversed(range(len(SHAPES)))
            for index in order:
                if index != NEVER:
                    scatter.add(index, gradient_of(world.rank, index, micro_batch).to(world.device, dtype))
        scatter.finish()
    scatter.wait()
    assert all(torch.equal(a, b) for a, b in zip(before, flats, strict=True))
    if reduces:
        del type(scatter)._exchanges
    return [flat.double().cpu() for flat in flats]


def mean_of(index: int, processes: int, passes: int) -> Tensor:
    if index == NEVER:
        return torch.zeros(torch.Size(SHAPES[index]).numel(), dtype=torch.float64)
    total = sum(gradient_of(rank, index, each) for rank in range(processes) for each in range(passes))
    assert isinstance(total, Tensor)
    return total.flatten() / processes


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("kind", ["parts", "ranges"])
@pytest.mark.parametrize("reduces", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("passes", [1, 2])
def test_each_process_has_its_part_of_the_mean(
    run_on: Callable[..., list[Any]], processes: int, kind: str, reduces: bool, dtypes: tuple[Any, Any], passes: int
) -> None:
    found = run_on(processes, HERE, "scattered", kind, *dtypes, reduces, passes)
    means = [mean_of(index, processes, passes) for index in range(len(SHAPES))]
    rtol = 1e-6 if dtypes[0] is torch.float32 else 2**-7
    if kind == "parts":
        for rank, (flat,) in enumerate(found):
            expected = []
            for mean in means:
                length = -(-len(mean) // processes)
                part = mean[rank * length : (rank + 1) * length]
                expected += [part, torch.zeros(length - len(part), dtype=torch.float64)]
            torch.testing.assert_close(flat, torch.cat(expected), rtol=rtol, atol=8 * rtol)
        return
    places, ranges = positions(processes)
    for group, length in enumerate(ranges):
        whole = torch.zeros(processes * length, dtype=torch.float64)
        for (its, at, numel), mean in zip(places, means, strict=True):
            if its == group:
                whole[at : at + numel] = mean
        torch.testing.assert_close(torch.cat([flats[group] for flats in found]), whole, rtol=rtol, atol=8 * rtol)

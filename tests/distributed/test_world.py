"""Agreement of processes, and failures that end a test instead of hanging it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import SECONDS, Group, RankFailed

from erasediff.parallel.world import World

HERE = Path(__file__)


def sums() -> dict[str, Any]:
    world = World.current()
    own = torch.tensor(0.1 + world.rank, dtype=torch.float64)
    total, mean = world.sum(own), world.mean(own)
    world.barrier()
    return {"world": (world.rank, world.size, world.is_main), "values": (float(own), float(total), float(mean))}


def fail_on_rank_1() -> None:
    world = World.current()
    if world.rank == 1:
        raise RuntimeError("the last straw")
    world.barrier()


def die_on_rank_1() -> None:
    world = World.current()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier()


def wait_for_ever() -> None:
    signal.pause()


def test_alone():
    world = World.current()
    value = torch.tensor(2.0)
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.sum(value) is value
    assert world.mean(value) is value
    world.barrier()


def test_three_processes_agree_bit_for_bit(run_on):
    results = run_on(3, HERE, "sums")
    assert [result["world"] for result in results] == [(0, 3, True), (1, 3, False), (2, 3, False)]
    own, totals, means = zip(*(result["values"] for result in results), strict=True)
    assert own == (0.1, 1.1, 2.1)
    assert len(set(totals)) == len(set(means)) == 1
    assert totals[0] == pytest.approx(3.3)
    assert means[0] == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("function", "seconds", "message"),
    [
        ("fail_on_rank_1", SECONDS, "the last straw"),
        ("die_on_rank_1", SECONDS, "rank 1 of 2 .*: died with exit code -9"),
        ("wait_for_ever", 5, "took over"),
    ],
)
def test_a_failing_process_fails_the_job_with_what_it_said(function, seconds, message):
    group = Group(2)
    with pytest.raises(RankFailed, match=message):
        group.run(HERE, function, seconds=seconds)
    assert not group.is_alive

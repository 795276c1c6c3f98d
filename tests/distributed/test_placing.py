"""Processes get a GPU each or none at all, and what they start finds the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Group
from placing import GPUS, environment, on_gpus

from erasediff.parallel.world import World

HERE = Path(__file__)


@pytest.mark.parametrize(
    ("processes", "gpus", "expected"),
    [(1, 0, False), (1, 1, True), (2, 1, False), (3, 2, False), (3, 3, True), (2, 8, True)],
)
def test_there_is_a_gpu_for_each_process_or_none_is_used(processes: int, gpus: int, expected: bool) -> None:
    assert on_gpus(processes, gpus, shared=False) is expected
    assert on_gpus(processes, gpus, shared=True) is (gpus > 0)
    assert environment(processes, gpus)["DS_ACCELERATOR"] == ("cuda" if expected else "cpu")
    # Without it all GPUs are there to be found: one for each rank by its number.
    assert environment(processes, gpus).get("CUDA_VISIBLE_DEVICES") == (None if expected else "")


def test_a_process_on_the_cpu_finds_no_gpu() -> None:
    question = (
        "import torch; from accelerate import PartialState; from deepspeed.accelerator import get_accelerator\n"
        "print(torch.cuda.is_available(), torch.cuda.device_count(), get_accelerator().device_name(), "
        "PartialState().device)"
    )
    command = [sys.executable, "-c", question]
    variables = {**os.environ, **environment(GPUS + 1)}
    answer = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=120).stdout
    assert answer.split()[-4:] == ["False", "0", "cpu", "cpu"]


def places() -> dict[str, Any]:
    device = World.current().device
    values = [torch.ones((), device=kind) for kind in {"cpu", device.type}]
    for value in values:
        dist.all_reduce(value)
    return {"device": str(device), "values": [float(value) for value in values]}


@pytest.mark.parametrize("widest", [1, GPUS + 1])
def test_a_group_computes_where_it_is_placed_and_sums_on_either_device(widest: int) -> None:
    group = Group(1, widest)
    try:
        [place] = group.run(HERE, "places")
    finally:
        group.close()
    assert place["device"] == ("cuda:0" if on_gpus(widest) else "cpu")
    assert set(place["values"]) == {1.0}

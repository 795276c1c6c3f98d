"""Number of processes that ``--launch`` starts."""

import sys

import pytest
import torch

from erasediff.cli.session import launch_workers
from erasediff.config import load_config
from erasediff.errors import UserError
from erasediff.parallel import launch


@pytest.mark.parametrize(
    ("settings", "gpus", "processes"),
    [
        ({}, 4, 4),
        ({}, 0, 1),
        ({"device": "cuda"}, 2, 2),
        ({"device": "cpu"}, 4, 1),
        ({"distributed.processes": 2}, 4, 2),
    ],
)
def test_one_process_per_gpu_unless_told(
    settings: dict[str, object], gpus: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[list[str], int]] = []

    def start(arguments: list[str], count: int) -> int:
        started.append((arguments, count))
        return 0

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(launch, "launch", start)
    monkeypatch.setattr(sys, "argv", ["erasediff", "unlearn", "--launch", "ddp"])
    with pytest.raises(SystemExit):
        launch_workers(load_config(None, {"distributed.launch": "ddp", **settings}), "unlearn")
    # The ranks write down how many they are.
    recorded = [] if "distributed.processes" in settings else ["--processes", str(processes)]
    assert started == [(["unlearn", "--launch", "ddp", *recorded], processes)]


def test_gpus_that_cannot_share_a_batch_are_told_before_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    config = load_config(None, {"distributed.launch": "ddp", "unlearn.batch_size": 4})
    with pytest.raises(UserError, match="3 processes cannot share"):
        launch_workers(config, "unlearn")

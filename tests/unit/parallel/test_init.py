"""Device of a rank, before anything runs on it."""

import pytest
import torch

from erasediff.errors import UserError
from erasediff.parallel.control_plane import ControlPlane
from erasediff.parallel.init import local_device


@pytest.fixture
def machine(monkeypatch):
    """``machine(gpus, size, place)``: a machine with GPUs, on which this process has a place among ``size`` ranks."""

    def of(gpus: int, size: int, place: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(ControlPlane, "_current", ControlPlane(rank=place, size=size))
        monkeypatch.setenv("LOCAL_RANK", str(place))

    return of


@pytest.mark.parametrize(
    ("gpus", "size", "name", "expected"),
    [
        (0, 2, "auto", "cpu"),
        (2, 2, "auto", "cuda:1"),
        (2, 2, "cuda", "cuda:1"),
        (2, 2, "cpu", "cpu"),
        # The only rank too: torch takes no GPU without a number as a process's own.
        (1, 1, "auto", "cuda:0"),
        (8, 1, "cuda", "cuda:0"),
    ],
)
def test_each_rank_has_a_device_of_its_own(machine, gpus, size, name, expected):
    machine(gpus, size, size - 1)
    assert local_device(name, "zero") == expected


@pytest.mark.parametrize("name", ["auto", "cuda:1"])
def test_without_a_launcher_any_device_can_be_chosen(machine, name):
    machine(8, 1, 0)
    assert local_device(name, "none") == name


@pytest.mark.parametrize(
    ("gpus", "name", "sentence"),
    [
        (1, "auto", "has 1 GPU, and process 2 needs one of its own: say --device cpu"),
        (0, "cuda", "has 0 GPUs, and process 2 needs one of its own: say --device cpu"),
        (2, "cuda:0", "say --device cuda, not cuda:0"),
    ],
)
def test_ranks_that_cannot_have_one_are_refused_with_what_to_do(machine, gpus, name, sentence):
    machine(gpus, 2, 1)
    with pytest.raises(UserError, match=sentence):
        local_device(name, "ddp")

"""Weights that are made whole again to be written: what they are, and that they lie on the disk, not in memory."""

from __future__ import annotations

import copy
import itertools
import tracemalloc
from collections.abc import Callable

import torch
from torch import Tensor, nn

from erasediff.parallel.factory import gradients_for
from erasediff.parallel.full_weights import gather_ema_weights, load_full_weights_
from erasediff_kernels import ConstrainedAdamW


def peak_of_tensors(act: Callable[[], object]) -> int:
    """The most bytes that tensors allocated on the host during ``act`` took at a time."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        act()
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    return max(itertools.accumulate(event.self_cpu_memory_usage for event in events))


def peak_of_objects(act: Callable[[], object]) -> int:
    """The most bytes that Python's own objects allocated during ``act`` took at a time."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_whole_model_is_on_the_disk_and_not_in_memory(tmp_path):
    # Counted by allocations: the process's resident memory also holds what the allocator keeps for later.
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(6)))
    largest = max(parameter.nbytes for parameter in model.parameters())
    gradients = gradients_for(model, ConstrainedAdamW(model.parameters(), lr=1e-2))
    list(gradients.shards())  # makes the optimizer's state
    weights: dict[str, Tensor] = {}

    def gather() -> None:
        weights.update(gather_ema_weights(model, gradients, tmp_path))

    assert largest <= peak_of_tensors(gather) < 1.5 * largest
    assert peak_of_objects(gather) < largest
    assert list(tmp_path.iterdir()) == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor), name


def test_averages_take_the_place_of_a_network_s_weights(tmp_path):
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    optimizer = ConstrainedAdamW(model.parameters(), lr=1e-2, ema_decay=0.5)
    for _ in range(2):
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network = copy.deepcopy(model)
    load_full_weights_(network, gather_ema_weights(model, gradients_for(model, optimizer), tmp_path))
    averaged = network.state_dict()
    assert averaged.keys() == own.keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(averaged[name], optimizer.state[parameter]["ema"]), name
        assert not torch.equal(averaged[name], own[name]), name
        assert torch.equal(parameter, own[name]), name
    assert int(averaged["1.num_batches_tracked"]) == 2

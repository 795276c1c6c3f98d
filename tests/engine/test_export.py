"""Weights that are made whole again to be written: what they are, and that they lie on the disk, not in memory."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import torch
from torch import nn

from erasediff.gradients import gradients_for
from erasediff.stages.export import averaged_whole, made_whole
from erasediff_kernels import ConstrainedAdamW


def memory_of_its_own() -> int:
    """Bytes of this process that no file has."""
    found = re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


def test_a_whole_model_is_on_the_disk_and_not_in_memory(tmp_path):
    # Large beside what the allocator keeps for later, some 36 MB.
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(12)))
    size = sum(parameter.nbytes for parameter in model.parameters())
    gradients = gradients_for(model, ConstrainedAdamW(model.parameters(), lr=1e-2))
    list(gradients.shards())  # makes the optimizer's state
    before = memory_of_its_own()
    weights = averaged_whole(model, gradients, tmp_path)
    assert memory_of_its_own() - before < size / 2
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
    made_whole(network, averaged_whole(model, gradients_for(model, optimizer), tmp_path))
    averaged = network.state_dict()
    assert averaged.keys() == own.keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(averaged[name], optimizer.state[parameter]["ema"]), name
        assert not torch.equal(averaged[name], own[name]), name
        assert torch.equal(parameter, own[name]), name
    assert int(averaged["1.num_batches_tracked"]) == 2

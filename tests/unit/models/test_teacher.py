"""Frozen teacher: it takes the memory of the trained weights only, and does not change."""

import torch
from torch import nn

from erasediff.models.trainable import frozen_copy


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    layers[0].requires_grad_(False)
    return layers.train()


def test_only_trained_parameters_are_copied_and_the_copy_stays_what_it_was() -> None:
    original = network()
    teacher = frozen_copy(original, share_frozen=True)
    assert teacher[0].weight is original[0].weight
    assert teacher[2].weight is not original[2].weight
    x = torch.randn(3, 4)
    before = teacher(x)
    with torch.no_grad():
        original[2].weight.add_(1.0)
        original(x)  # moves the running statistics of the one in training mode
    assert torch.equal(teacher(x), before)
    assert original[2].weight.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.training


def test_a_network_that_will_be_cut_shares_nothing() -> None:
    original = network()
    teacher = frozen_copy(original, share_frozen=False)
    pointers = {parameter.data_ptr() for parameter in original.parameters()}
    assert pointers.isdisjoint(parameter.data_ptr() for parameter in teacher.parameters())

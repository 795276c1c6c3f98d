"""Pruning without the command line: constructors are enough, and their mistakes are told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from erasediff import Process
from erasediff.methods.concept_prune import most_important_per_neuron
from erasediff.methods.pruning import PrunedEraseDiff, PrunedESD
from erasediff.models.weight_masks import add_masks, most_important
from erasediff_kernels import ConstrainedAdamW


def names(network: nn.Module) -> list[str]:
    return [name for name, _ in network.named_parameters()]


def test_learned_masks_take_steps_from_python(
    make_model: Callable[[], nn.Module], process: Process, make_batch: Callable[..., dict[str, torch.Tensor]]
) -> None:
    """Constructor arguments are enough; what they leave out is told when it is asked for."""
    model = make_model()
    optimizer = ConstrainedAdamW(add_masks(model, names(model), 0.5), lr=0.1)
    method = PrunedEraseDiff(model, optimizer, process=process, sparsity_weight=0.1)
    assert method.step(make_batch(1), make_batch(2)).finite
    with pytest.raises(ValueError, match="retain_batches"):
        method.observations(1)
    model = make_model()
    optimizer = ConstrainedAdamW(add_masks(model, names(model), 0.5), lr=0.1)
    by_prompts = PrunedESD(
        model,
        optimizer,
        process=process,
        concepts={"class_labels": torch.tensor([1])},
        null={"class_labels": torch.tensor([5])},
        shape=(1, 2, 3),
        batch_size=4,
        num_inference_steps=10,
    )
    assert by_prompts.step().finite
    assert len(list(by_prompts.observations(2))) == 2


def test_a_network_without_masks_and_a_penalty_that_rewards_are_refused(model: nn.Module, process: Process) -> None:
    with pytest.raises(ValueError, match="no masks"):
        PrunedEraseDiff(model, ConstrainedAdamW(model.parameters(), lr=0.1), process=process)
    optimizer = ConstrainedAdamW(add_masks(model, names(model), 0.5), lr=0.1)
    with pytest.raises(ValueError, match="sparsity_weight"):
        PrunedEraseDiff(model, optimizer, process=process, sparsity_weight=-1.0)


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 2, 2)])
@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_each_neurons_most_important_weights_are_those_of_its_row_alone(shape: tuple[int, ...], share: float) -> None:
    importance = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([most_important(row, share) for row in importance])
    assert torch.equal(most_important_per_neuron(importance, share), expected)

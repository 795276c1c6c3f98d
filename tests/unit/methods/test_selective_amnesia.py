"""Selective Amnesia: its loss's gradient in full, the Fisher information, resuming, and the digits."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from erasediff import Process
from erasediff.config import load_config
from erasediff.diffusion import DenoisingObjective, NoiseRole, micro_batches, noise_key
from erasediff.methods import SelectiveAmnesia
from erasediff.models import PixelModel
from erasediff.workflows.build_unlearning import build_unlearning_job
from erasediff_kernels import ConstrainedAdamW, ConstrainedSGD, philox_noise

Batches = Callable[..., dict[str, Tensor]]


def test_fisher_information_is_the_mean_squared_gradient(
    model: nn.Module, make_model: Callable[[], nn.Module], process: Process, make_batch: Batches
) -> None:
    method = SelectiveAmnesia(model, ConstrainedSGD(model.parameters(), lr=0.1), process=process, seed=5)
    batches = [make_batch(label, seed=label) for label in (1, 2, 3)]
    method.estimate_fisher(batches)
    expected = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for count, batch in enumerate(batches, start=1):
        twin = make_model()
        roles = {"noise": NoiseRole.FISHER_NOISE, "timestep": NoiseRole.FISHER_TIMESTEP}
        objective = DenoisingObjective(process=process)
        [(part, share)] = micro_batches(batch)
        objective.denoising_loss(twin, part, share, key=noise_key(5, count, "cpu"), **roles).backward()
        for total, parameter in zip(expected, twin.parameters(), strict=True):
            total += parameter.grad.square() / 3
    torch.testing.assert_close(method.fisher, expected)
    with pytest.raises(ValueError, match="at least one"):
        method.estimate_fisher([])


def test_the_step_is_down_the_whole_loss(
    model: nn.Module, make_model: Callable[[], nn.Module], process: Process, make_batch: Batches
) -> None:
    lr, weight = 0.05, 30.0
    optimizer = ConstrainedSGD(model.parameters(), lr=lr)
    method = SelectiveAmnesia(model, optimizer, process=process, ewc_weight=weight, max_grad_norm=None)
    method.estimate_fisher([make_batch(1)])
    retain, forget = make_batch(1), make_batch(2)
    method.step(retain, forget)
    twin = make_model()
    twin.load_state_dict(model.state_dict())
    method.step(retain, forget)

    key, objective = noise_key(0, 1, "cpu"), DenoisingObjective(process=process)
    objective.retain_loss(twin, *micro_batches(retain)[0], key=key).backward()
    uniform = philox_noise(forget["sample_ids"], key, int(NoiseRole.SURROGATE), (1, 2, 3), "uniform")
    roles = {"noise": NoiseRole.FORGET_NOISE, "timestep": NoiseRole.FORGET_TIMESTEP}
    surrogate = {**forget, "sample": 2 * uniform - 1}
    objective.denoising_loss(twin, *micro_batches(surrogate)[0], key=key, **roles).backward()
    penalty = sum(
        (fisher * (parameter - original).square()).sum()
        for fisher, parameter, original in zip(method.fisher, twin.parameters(), make_model().parameters(), strict=True)
    )
    (weight / 2 * penalty).backward()
    for moved, parameter in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(moved, parameter - lr * parameter.grad)


def test_resumed_is_uninterrupted_bit_for_bit(
    make_model: Callable[[], nn.Module], process: Process, make_batch: Batches
) -> None:
    whole, again = make_model(), make_model()
    first, second = (
        SelectiveAmnesia(model, ConstrainedAdamW(model.parameters(), lr=1e-2), process=process)
        for model in (whole, again)
    )
    first.estimate_fisher([make_batch(1)])
    batches = make_batch(1), make_batch(2)
    for _ in range(3):
        first.step(*batches)
    again.load_state_dict(copy.deepcopy(whole.state_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(3):
        first.step(*batches)
        second.step(*batches)
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "named",
    [
        {"unlearn.method": "selective-amnesia", "selective_amnesia.fisher_batches": 2},
        {"unlearn.method": "retrain"},
        {"unlearn.method": "pruning", "pruning.objective": "erasediff"},
    ],
)
def test_a_model_of_the_digits(named: dict[str, object]) -> None:
    model = PixelModel.build(num_classes=10, block_out_channels=(8, 8), seed=1)
    before = {name: value.clone() for name, value in model.unet.state_dict().items()}
    config = load_config(None, {"device": "cpu", "unlearn.forget": [3], "unlearn.batch_size": 8, **named})
    session = build_unlearning_job(config, model)
    list(session.trial_steps(2))
    after = model.unet.state_dict()
    if named["unlearn.method"] == "retrain":
        # A seed of its own, and no trace of the weights that were there.
        assert not any(torch.equal(after[name], value) for name, value in before.items() if value.ndim > 1)
    if named["unlearn.method"] == "pruning":
        assert any(name.endswith(".score") for name in after)
    else:
        assert any(not torch.equal(after[name], value) for name, value in before.items())

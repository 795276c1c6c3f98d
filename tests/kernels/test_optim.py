"""Steps of the constrained optimizers: their numbers against torch's, schedules, averages, rounding, arguments."""

import copy
import itertools
from typing import Any

import pytest
import torch
from optimizer_cases import adamw, constrained, like, parameters, same, sgd
from torch import Tensor

from erasediff_kernels import (
    ConstrainedSGD,
    constrained_sgd_,
    constraint_multiplier,
    gradient_gram,
    pack_mask,
)

KINDS = pytest.mark.parametrize("make", [adamw, sgd])


def test_constrained_step_equals_torch_adamw_on_the_combination(device: str) -> None:
    params = parameters(device)
    theirs = copy.deepcopy(params)
    optimizer, reference = adamw(params), torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1)
    for step in range(4):
        constraint = constrained(optimizer, step)
        torch.manual_seed(step)
        retain, forget = like(params), like(params)
        for q, r, g in zip(theirs, retain, forget, strict=True):
            q.grad = (r + constraint.multiplier * g) * constraint.clip_scale
        reference.step()
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q)


def test_plain_step_equals_torch_adamw_and_skips_parameters_without_gradient(device: str) -> None:
    params = parameters(device)
    theirs = copy.deepcopy(params)
    optimizer, reference = adamw(params), torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (params[0].square().sum() + params[2].sin().sum()).detach().requires_grad_()
        for p, q in ((params[0], theirs[0]), (params[2], theirs[2])):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        return loss

    for _ in range(3):
        assert optimizer.step(closure) is not None
        reference.step()
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q)
    assert params[1] not in optimizer.state


@KINDS
def test_groups_frozen_parameters_and_order(device: str, make: Any) -> None:
    params = parameters(device)
    params[1].requires_grad_(False)
    optimizer = make([{"params": [params[2]], "lr": 0.0}, {"params": params[:2]}])
    assert [id(p) for p in optimizer.parameters_in_order()] == [id(params[2]), id(params[0])]
    before = copy.deepcopy(params)
    constrained(optimizer, 0)
    same(params[1:], before[1:])
    assert not torch.equal(params[0], before[0])
    assert [float(group["step"]) for group in optimizer.param_groups] == [1.0, 1.0]


@KINDS
def test_a_non_finite_step_is_skipped(device: str, make: Any) -> None:
    params = parameters(device)
    optimizer = make(params)
    before = copy.deepcopy(params)
    retain = like(params)
    retain[1][0] = float("inf")
    constraint = constraint_multiplier(gradient_gram(retain, retain))
    optimizer.constrained_step(retain, retain, constraint)
    same(params, before)
    assert optimizer.param_groups[0]["step"] == 0.0


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 3)),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
    ],
)
def test_schedulers(device: str, schedule: Any) -> None:
    params = parameters(device)
    theirs = copy.deepcopy(params)
    optimizer, reference = adamw(params), torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1)
    schedulers = schedule(optimizer), schedule(reference)
    for _ in range(6):
        for p, q in zip(params, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
        for scheduler in schedulers:
            scheduler.step()
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q)


def test_lr_reaches_the_device_only_when_it_changes(device: str) -> None:
    optimizer = adamw(parameters(device))
    group = optimizer.param_groups[0]
    where = torch.device(device)
    first = optimizer._scalar("lr", group["lr"], where)
    version = first._version
    assert optimizer._scalar("lr", 0.01, where) is first
    assert first._version == version
    assert optimizer._scalar("lr", 0.02, where) is first
    assert first == 0.02


def test_tensor_lr(device: str) -> None:
    params = parameters(device)
    twins = copy.deepcopy(params)
    lr = torch.tensor(0.01, device=device)
    optimizer, other = adamw(params, lr=lr), adamw(twins)
    for seed, value in enumerate((0.01, 0.03)):
        lr.fill_(value)
        other.param_groups[0]["lr"] = float(lr)
        constrained(optimizer, seed)
        constrained(other, seed)
    same(params, twins)


def test_ema_starts_at_the_first_step(device: str) -> None:
    params = parameters(device)
    start = copy.deepcopy(params)
    optimizer = adamw(params, ema_decay=0.9)
    assert list(optimizer.ema_parameters()) == []
    constrained(optimizer, 0)
    for (p, average), first in zip(optimizer.ema_parameters(), start, strict=True):
        torch.testing.assert_close(average, (0.9 * first + 0.1 * p).detach())


def test_master_weights_keep_small_updates(device: str) -> None:
    params = [torch.nn.Parameter(torch.ones(64, device=device, dtype=torch.bfloat16))]
    optimizer = ConstrainedSGD(params, lr=1e-3, master_weights=True)
    for _ in range(20):
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
    master = optimizer.state[params[0]]["master"]
    assert master.dtype == torch.float32
    torch.testing.assert_close(master, torch.full_like(master, 0.98))
    assert torch.equal(params[0].detach(), master.bfloat16())


def test_stochastic_rounding_keeps_small_updates_on_average(device: str) -> None:
    params = [torch.nn.Parameter(torch.ones(4096, device=device, dtype=torch.bfloat16))]
    optimizer = ConstrainedSGD(params, lr=1e-3, stochastic_rounding=True)
    for _ in range(20):
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
    assert abs(params[0].double().mean() - 0.98) < 1e-3


def test_stochastic_rounding_differs_between_groups(device: str) -> None:
    params = [torch.nn.Parameter(torch.full((512,), 0.75, device=device, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = ConstrainedSGD([{"params": [p]} for p in params], lr=1e-3, stochastic_rounding=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(params[0], params[1])


def test_stochastic_rounding_uses_all_bits_of_the_seed(device: str) -> None:
    results = []
    for seed in (5, 5 | 1 << 32, 5 | 1 << 63, 5):
        params = [torch.nn.Parameter(torch.full((512,), 0.75, device=device, dtype=torch.bfloat16))]
        optimizer = ConstrainedSGD(params, lr=1e-3, stochastic_rounding=True, seed=seed)
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
        results.append(params[0].detach())
    assert torch.equal(results[0], results[3])
    assert not any(torch.equal(first, second) for first, second in itertools.combinations(results[:3], 2))


def test_the_first_bucket_is_rounded_with_the_seed_itself(device: str) -> None:
    """Seeds below 2^32 keep their random bits from version to version."""
    seed, start = 0xFEDCBA98, torch.full((512,), 0.75, device=device, dtype=torch.bfloat16)
    params = [torch.nn.Parameter(start.clone())]
    optimizer = ConstrainedSGD(params, lr=1e-3, stochastic_rounding=True, seed=seed)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    scalars = {name: torch.ones((), device=device) for name in ("multiplier", "clip_scale")}
    scalars |= {"lr": torch.tensor(1e-3, dtype=torch.float64, device=device), "step": torch.zeros((), device=device)}
    expected, key = [start.clone()], torch.tensor([seed, 0], device=device)
    finite = torch.tensor(True, device=device)
    constrained_sgd_(expected, [], [torch.ones_like(start)], [], **scalars, finite=finite, rounding_key=key)
    same(params, expected)


def test_parameters_of_several_dtypes_share_one_step_count(device: str) -> None:
    params = [
        torch.nn.Parameter(torch.randn(8, device=device)),
        torch.nn.Parameter(torch.randn(8, device=device).bfloat16()),
        torch.nn.Parameter(torch.randn(8, device=device)),
    ]
    optimizer = adamw(params, master_weights=True)
    optimizer.set_mask(params[2], pack_mask(torch.arange(8, device=device) < 4))
    frozen = params[2].detach().clone()
    for seed in range(3):
        constrained(optimizer, seed)
    assert optimizer.param_groups[0]["step"] == 3.0
    assert torch.equal(params[2].detach()[4:], frozen[4:])
    assert not torch.equal(params[2].detach()[:4], frozen[:4])
    optimizer.set_mask(params[2], None)
    constrained(optimizer, 4)
    assert not torch.equal(params[2].detach()[4:], frozen[4:])


def test_channels_last_parameters(device: str) -> None:
    weight = torch.randn(2, 4, 3, 3, device=device)
    params = [torch.nn.Parameter(weight.to(memory_format=torch.channels_last))]
    twins = [torch.nn.Parameter(weight.clone())]
    optimizer, other = adamw(params, ema_decay=0.5), adamw(twins, ema_decay=0.5)
    for _ in range(2):
        r, g = torch.randn(2, 2, 4, 3, 3, device=device)
        constraint = constraint_multiplier(gradient_gram([r], [g]))
        optimizer.constrained_step([r], [g], constraint)
        other.constrained_step([r], [g], constraint)
    same(params, twins)
    assert params[0].stride() != twins[0].stride()


def test_bad_arguments() -> None:
    params = parameters("cpu")
    for options in (
        {"lr": -1.0},
        {"weight_decay": -1.0},
        {"ema_decay": 1.5},
        {"betas": (1.0, 0.9)},
        {"eps": -1.0},
        {"master_weights": True, "stochastic_rounding": True},
    ):
        with pytest.raises(ValueError, match="|".join(options)):
            adamw(params, **options)
    with pytest.raises(ValueError, match="nesterov"):
        ConstrainedSGD(params, 0.1, nesterov=True)
    with pytest.raises(ValueError, match="momentum"):
        ConstrainedSGD(params, 0.1, momentum=-0.1)
    optimizer = adamw(params)
    gradients = like(params)
    constraint = constraint_multiplier(gradient_gram(gradients, gradients))
    with pytest.raises(ValueError, match="parameters_in_order"):
        optimizer.constrained_step(gradients[:2], gradients, constraint)
    with pytest.raises(ValueError, match="parameters_in_order"):
        optimizer.constrained_step(gradients, gradients[:2], constraint)
    with pytest.raises(ValueError, match="retain"):
        optimizer.constrained_step(gradients[::-1], gradients, constraint)

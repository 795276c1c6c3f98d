import copy
import io
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from erasediff_kernels import (
    ConstrainedAdamW,
    ConstrainedSGD,
    Constraint,
    constrained_sgd_,
    constraint_multiplier,
    gradient_gram,
    pack_mask,
)

SHAPES = [(3,), (5, 7), (8, 8)]


def parameters(device: str, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in SHAPES]


def like(params: list[torch.nn.Parameter]) -> list[Tensor]:
    return [torch.randn_like(p) for p in params]


def constrained(optimizer: Any, seed: int) -> Constraint:
    """One constrained step with gradients made from `seed`."""
    torch.manual_seed(seed)
    params = optimizer.parameters_in_order()
    retain, forget = like(params), like(params)
    constraint = constraint_multiplier(gradient_gram(retain, forget), eta=0.5, max_norm=1.0)
    optimizer.constrained_step(retain, forget, constraint)
    return constraint


def same(first: Any, second: Any) -> None:
    for p, q in zip(first, second, strict=True):
        assert torch.equal(p.detach(), q.detach())


def adamw(params: Any, **options: Any) -> ConstrainedAdamW:
    return ConstrainedAdamW(params, **{"lr": 0.01, "weight_decay": 0.1, **options})


def sgd(params: Any, **options: Any) -> ConstrainedSGD:
    return ConstrainedSGD(params, **{"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, **options})


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


VARIANTS = [
    {},
    {"ema_decay": 0.9},
    {"dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "master_weights": True, "ema_decay": 0.9},
    {"dtype": torch.float16, "stochastic_rounding": True, "seed": 5},
]


CODED = [
    {"moments": "8-bit", "ema_decay": 0.9},
    {"moments": "8-bit", "dtype": torch.bfloat16, "stochastic_rounding": True},
    {"moments": "8-bit", "dtype": torch.bfloat16, "master_weights": True},
]


@pytest.mark.parametrize(
    ("make", "options"),
    [*((make, options) for make in (adamw, sgd) for options in VARIANTS), *((adamw, options) for options in CODED)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_state_dict_round_trip(device: str, make: Any, options: dict[str, Any]) -> None:
    """Saved, loaded into a new optimizer and continued, the run is the uninterrupted one, bit for bit."""
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    params = parameters(device, dtype)

    def build(tensors: list[torch.nn.Parameter]) -> Any:
        optimizer = make(tensors[:2], **options)
        optimizer.add_param_group({"params": tensors[2:], "lr": 0.02})
        return optimizer

    optimizer = build(params)
    optimizer.set_mask(params[1], pack_mask(torch.rand(5, 7, device=device) < 0.5))
    for seed in range(3):
        constrained(optimizer, seed)

    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    restored_params = copy.deepcopy(params)
    restored = build(restored_params)
    restored.load_state_dict(torch.load(file, weights_only=True))

    for p, q in zip(params, restored_params, strict=True):
        assert optimizer.state[p].keys() == restored.state[q].keys()
        for name, value in optimizer.state[p].items():
            assert restored.state[q][name].dtype == value.dtype
            assert torch.equal(restored.state[q][name], value)
            assert restored.state[q][name].data_ptr() != value.data_ptr()
    for seed in range(3, 6):
        constrained(optimizer, seed)
        constrained(restored, seed)
    same(params, restored_params)
    same([e for _, e in optimizer.ema_parameters()], [e for _, e in restored.ema_parameters()])


def test_eight_bits_take_a_quarter_of_the_moments_and_train_alike(device: str) -> None:
    """A regression by each kind of moments: the same losses, within the differences between two seeds."""
    inputs, targets = torch.randn(2, 256, 32, device=device)
    losses, sizes = [], []
    for moments in ("float", "8-bit"):
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32)).to(device)
        optimizer = adamw(net.parameters(), moments=moments)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (net(inputs) - targets).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        states = [optimizer.state[p] for p in net.parameters()]
        sizes.append(sum(tensor.nbytes for state in states for tensor in state.values()))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert sizes[1] < 0.26 * sizes[0]


def test_a_group_may_have_its_own_moments(device: str) -> None:
    params = parameters(device)
    optimizer = adamw([{"params": params[:2], "moments": "8-bit"}, {"params": params[2:]}])
    constrained(optimizer, 0)
    assert [optimizer.state[p]["exp_avg"].dtype for p in params] == [torch.int8, torch.int8, torch.float32]


@KINDS
def test_deepcopy_continues_alone(device: str, make: Any) -> None:
    params = parameters(device)
    optimizer = make(params)
    constrained(optimizer, 0)
    twin = copy.deepcopy(optimizer)
    before = copy.deepcopy(params)
    constrained(twin, 1)
    same(params, before)
    constrained(optimizer, 1)
    same(params, twin.parameters_in_order())


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


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of one process, enough to make distributed tensors."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_distributed_tensors_are_updated_through_their_shards(mesh: DeviceMesh) -> None:
    plain = parameters("cpu")
    params = [torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in plain]
    optimizer, other = adamw(params, ema_decay=0.9), adamw(plain, ema_decay=0.9)
    for seed in range(2):
        constraint = constrained(other, seed)
        torch.manual_seed(seed)
        retain, forget = ([distribute_tensor(t, mesh, [Shard(0)]) for t in like(plain)] for _ in range(2))
        optimizer.constrained_step(retain, forget, constraint)
    same([p.full_tensor() for p in params], plain)
    assert isinstance(optimizer.state[params[0]]["exp_avg"], DTensor)
    with pytest.raises(ValueError, match="distributed"):
        adamw(params, moments="8-bit").initialize_state()
    restored = adamw(copy.deepcopy(params), ema_decay=0.9)
    restored.load_state_dict(optimizer.state_dict())
    for (p, average), (q, other_average) in zip(optimizer.ema_parameters(), restored.ema_parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q.full_tensor())
        assert torch.equal(average.full_tensor(), other_average.full_tensor())


@KINDS
def test_a_pending_constraint_makes_step_the_constrained_step(make: Any) -> None:
    """Called whole, or once for each part of a group as ZeRO-3 does: the same bits, and one step counted."""
    results = []
    for how in ("constrained_step", "step", "step by parts"):
        torch.manual_seed(0)
        optimizer = make(parameters("cpu"), ema_decay=0.9)
        params = optimizer.parameters_in_order()
        for _ in range(3):
            retain, forget = like(params), like(params)
            constraint = constraint_multiplier(gradient_gram(retain, forget), eta=0.5, max_norm=1.0)
            if how == "constrained_step":
                optimizer.constrained_step(retain, forget, constraint)
                continue
            for p, gradient in zip(params, retain, strict=True):
                p.grad = gradient
            group = optimizer.param_groups[0]
            with optimizer.pending(dict(zip(params, forget, strict=True)), constraint):
                for part in [params] if how == "step" else [[p] for p in params]:
                    group["params"] = part
                    optimizer.step()
            group["params"] = params
        results.append((params, [average for _, average in optimizer.ema_parameters()]))
        assert float(optimizer.param_groups[0]["step"]) == 3.0
    for params, averages in results[1:]:
        same(params, results[0][0])
        same(averages, results[0][1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@KINDS
def test_parameters_that_move_to_the_host_after_the_optimizer_was_made_are_counted_too(make: Any) -> None:
    """As DeepSpeed offloads an optimizer: its groups then hold partitions on the host."""
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        optimizer = make(parameters("cpu"))
        params = optimizer.parameters_in_order()
        optimizer.param_groups[0]["step"] = optimizer.param_groups[0]["step"].to(device)
        for _ in range(3):
            retain, forget = like(params), like(params)
            constraint = constraint_multiplier(gradient_gram(retain, forget), eta=0.5, max_norm=1.0)
            optimizer.constrained_step(retain, forget, constraint)
        assert float(optimizer.param_groups[0]["step"]) == 3.0
        results.append(params)
    same(*results)


@KINDS
def test_state_can_be_made_before_the_first_step(make: Any) -> None:
    optimizer = make(parameters("cpu", torch.bfloat16), master_weights=True, ema_decay=0.9)
    optimizer.initialize_state()
    for p in optimizer.parameters_in_order():
        state = optimizer.state[p]
        assert torch.equal(state["master"], p.detach().float())
        assert torch.equal(state["ema"], p.detach().float())
        assert not any(state[name].any() for name in optimizer.MOMENTS)


def freeze(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"][1].requires_grad_(False)


def mask(optimizer: Any) -> None:
    param = optimizer.param_groups[0]["params"][2]
    optimizer.set_mask(param, pack_mask(torch.arange(param.numel(), device=param.device).view(param.shape) % 3 == 0))


def forget_state(optimizer: Any) -> None:
    del optimizer.state[optimizer.param_groups[0]["params"][0]]


def load(optimizer: Any) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def halve(optimizer: Any) -> None:
    param = optimizer.param_groups[0]["params"][1]
    param.data = param.data.bfloat16()


@pytest.mark.parametrize("change", [freeze, mask, forget_state, load, halve])
@KINDS
def test_what_changes_between_steps_is_seen(device: str, make: Any, change: Any) -> None:
    """Buckets are kept from step to step: an optimizer that has kept them does what one without any does."""
    optimizer = make(parameters(device), ema_decay=0.9)
    for seed in range(3):
        constrained(optimizer, seed)
    change(optimizer)
    fresh = copy.deepcopy(optimizer)
    fresh._bucket_caches.clear()
    for seed in range(3, 6):
        constrained(optimizer, seed)
        fresh._bucket_caches.clear()
        constrained(fresh, seed)
    params, others = (each.param_groups[0]["params"] for each in (optimizer, fresh))
    same(params, others)
    for p, q in zip(params, others, strict=True):
        assert optimizer.state[p].keys() == fresh.state[q].keys()
        assert all(torch.equal(value, fresh.state[q][name]) for name, value in optimizer.state[p].items())

"""State of the constrained optimizers: saved and loaded, copied, distributed, offloaded, kept between steps."""

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from optimizer_cases import adamw, constrained, like, parameters, same, sgd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from erasediff_kernels import (
    constraint_multiplier,
    gradient_gram,
    pack_mask,
)

KINDS = pytest.mark.parametrize("make", [adamw, sgd])

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

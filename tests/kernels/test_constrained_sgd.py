from typing import Any

import pytest
import torch
from torch import Tensor

from erasediff_kernels import constrained_sgd_, pack_mask

SHAPES = [(0,), (), (1,), (3,), (5, 7), (8, 8), (1000,), (2, 4099)]
LR, DECAY, LAMBDA, SCALE = 0.05, 0.1, 0.7, 0.4


def randoms(device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, device=device).to(dtype) for shape in SHAPES]


def run(
    params: list[Tensor],
    buffers: list[Tensor],
    retain: list[Tensor],
    forget: list[Tensor],
    *,
    finite: bool = True,
    **options: Any,
) -> Tensor:
    device = params[0].device
    step = torch.tensor(4.0, device=device)
    constrained_sgd_(
        params,
        buffers,
        retain,
        forget,
        multiplier=torch.tensor(LAMBDA, device=device),
        clip_scale=torch.tensor(SCALE, device=device),
        finite=torch.tensor(finite, device=device),
        lr=torch.tensor(LR, device=device),
        step=step,
        weight_decay=DECAY,
        **options,
    )
    return step


def exact(
    p: Tensor, b: Tensor | None, r: Tensor, g: Tensor | None, momentum: float, nesterov: bool
) -> tuple[Tensor, Tensor]:
    lr, lam, scale = (float(torch.tensor(value)) for value in (LR, LAMBDA, SCALE))
    delta = scale * (r.double() + lam * g.double()) if g is not None else scale * r.double()
    buffer = delta if b is None else momentum * b.double() + delta
    direction = delta + momentum * buffer if nesterov else buffer
    return p.double() * (1 - lr * DECAY) - lr * direction, buffer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("forget", [True, False])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_against_fp64(
    device: str, dtype: torch.dtype, forget: bool, momentum: float, nesterov: bool, assert_within_twice
) -> None:
    params, retain, forgets = (randoms(device, dtype) for _ in range(3))
    buffers = randoms(device, torch.float32 if dtype.itemsize == 2 else dtype) if momentum else []
    wanted = [
        exact(p, buffers[i] if momentum else None, retain[i], forgets[i] if forget else None, momentum, nesterov)
        for i, p in enumerate(params)
    ]
    step = run(params, buffers, retain, forgets if forget else [], momentum=momentum, nesterov=nesterov)
    assert step == 5.0
    for index, (p, (want, buffer)) in enumerate(zip(params, wanted, strict=True)):
        if dtype.itemsize == 2:
            assert_within_twice(p, want.to(dtype), want)
        else:
            torch.testing.assert_close(p, want.to(dtype))
        if momentum:
            torch.testing.assert_close(buffers[index], buffer.to(buffers[index].dtype))


def test_steps_equal_torch_sgd(device: str) -> None:
    params, buffers = randoms(device), [torch.zeros_like(t) for t in randoms(device)]
    theirs = [torch.nn.Parameter(p * 1.0) for p in params]
    optimizer = torch.optim.SGD(theirs, lr=LR, momentum=0.9, nesterov=True)
    for _ in range(4):
        retain, forget = randoms(device), randoms(device)
        for q, r, g in zip(theirs, retain, forget, strict=True):
            q.grad = SCALE * (r + LAMBDA * g)
            q.data.mul_(1.0 - LR * DECAY)
        optimizer.step()
        run(params, buffers, retain, forget, momentum=0.9, nesterov=True)
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-5, atol=1e-5)


def test_nothing_changes_when_not_finite(device: str) -> None:
    params, buffers, bad = randoms(device), randoms(device), [t * float("nan") for t in randoms(device)]
    ema, copies = randoms(device), randoms(device, torch.bfloat16)
    lists = [params, buffers, ema, copies]
    before = [[t.clone() for t in tensors] for tensors in lists]
    step = run(params, buffers, bad, bad, finite=False, momentum=0.9, ema=ema, ema_decay=0.5, copies=copies)
    assert step == 4.0
    for old, new in zip(before, lists, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


def test_masks_ema_and_copies(device: str) -> None:
    params, buffers, retain, forget = (randoms(device) for _ in range(4))
    before = [t.clone() for t in params], [t.clone() for t in buffers]
    masks = [torch.rand(p.shape, device=device) < 0.5 for p in params]
    ema, copies = [torch.zeros_like(p) for p in params], [torch.empty_like(p, dtype=torch.float16) for p in params]
    wanted = [exact(*operands, 0.9, False) for operands in zip(params, buffers, retain, forget, strict=True)]
    packed = [pack_mask(mask) for mask in masks]
    run(params, buffers, retain, forget, momentum=0.9, masks=packed, ema=ema, ema_decay=0.5, copies=copies)
    for index, mask in enumerate(masks):
        for new, old, want in zip((params, buffers), before, wanted[index], strict=True):
            assert torch.equal(new[index][~mask], old[index][~mask])
            torch.testing.assert_close(new[index][mask], want[mask].float())
        torch.testing.assert_close(ema[index], 0.5 * params[index])
        assert torch.equal(copies[index], params[index].half())


def test_stochastic_rounding(device: str) -> None:
    n, ulp = 20_000, 2.0**-8
    params = [torch.full((n,), 0.75, device=device, dtype=torch.bfloat16)]
    gradient = [torch.full((n,), 0.03, device=device)]
    want, _ = exact(params[0], None, gradient[0], None, 0.0, False)
    run(params, [], gradient, [], rounding_key=torch.tensor([1, 2], device=device))
    assert ((params[0].double() - want).abs() < ulp).all()
    assert abs((params[0].double() - want).mean()) < 2.5 * ulp / n**0.5


def test_opcheck(device: str) -> None:
    def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.rand(shape, device=device).to(dtype) for shape in ((3,), (4, 5))]

    masks = [torch.tensor([5], dtype=torch.uint8, device=device), torch.ones(3, dtype=torch.uint8, device=device)]
    key = torch.tensor([1, 2], device=device)
    scalars = tuple(torch.tensor(value, device=device) for value in (0.5, 0.9, True, 0.1, 3.0))
    for arguments in (
        (tensors(), [], tensors(), tensors(), [], [], [], *scalars, 0.0, False, 0.1, 0.0, None),
        (
            *(tensors(torch.bfloat16), tensors(), tensors(), tensors(), tensors(), tensors(torch.float16), masks),
            *(*scalars, 0.9, True, 0.1, 0.9, key),
        ),
    ):
        torch.library.opcheck(torch.ops.erasediff.constrained_sgd_.default, arguments)


def test_bad_arguments() -> None:
    params = randoms("cpu")
    with pytest.raises(ValueError, match="momentum_buffers"):
        run(params, [], params, params, momentum=0.9)
    with pytest.raises(ValueError, match="momentum_buffers"):
        run(params, params, params, params, momentum=0.0)
    with pytest.raises(ValueError, match="nesterov"):
        run(params, [], params, params, nesterov=True)

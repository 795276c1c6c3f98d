"""The update against its formula in fp64 and against `torch.optim.AdamW`."""

from typing import Any

import pytest
import torch
from torch import Tensor

from erasediff_kernels import constrained_adamw_, pack_mask

SHAPES = [(0,), (), (1,), (3,), (5, 7), (8, 8), (3, 4, 3, 3), (1000,), (2, 4099)]
HYPER = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1}


def scalar(value: float | bool, device: str) -> Tensor:
    return torch.tensor(value, device=device)


class Problem:
    """Parameters, state and gradients for one call, and the fp64 result it should have."""

    def __init__(
        self,
        device: str,
        shapes: list[tuple[int, ...]] = SHAPES,
        dtype: torch.dtype = torch.float32,
        moment_dtype: torch.dtype | None = None,
        gradient_dtype: torch.dtype = torch.float32,
        finite: bool = True,
    ) -> None:
        moment_dtype = moment_dtype or dtype

        def tensors(to: torch.dtype) -> list[Tensor]:
            return [torch.randn(shape, device=device).to(to) for shape in shapes]

        self.params, self.retain, self.forget = tensors(dtype), tensors(gradient_dtype), tensors(gradient_dtype)
        self.exp_avgs = tensors(moment_dtype)
        self.exp_avg_sqs = [t.square() for t in tensors(moment_dtype)]
        self.scalars = {
            "multiplier": scalar(0.7, device),
            "clip_scale": scalar(0.4, device),
            "finite": torch.tensor(finite, device=device),
            "lr": scalar(0.05, device),
        }
        self.step = scalar(4.0, device)

    @property
    def written(self) -> dict[str, list[Tensor]]:
        return {"params": self.params, "exp_avgs": self.exp_avgs, "exp_avg_sqs": self.exp_avg_sqs}

    def run(self, forget: bool = True, **options: Any) -> None:
        constrained_adamw_(
            self.params,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.retain,
            self.forget if forget else [],
            **self.scalars,
            step=self.step,
            **HYPER,
            **options,
        )

    def exact(self, forget: bool = True) -> dict[str, list[Tensor]]:
        """The formula in fp64, on whatever the tensors hold now."""
        lam, scale, lr = (float(self.scalars[name]) for name in ("multiplier", "clip_scale", "lr"))
        t = float(self.step) + 1.0
        beta1, beta2 = HYPER["beta1"], HYPER["beta2"]
        result: dict[str, list[Tensor]] = {"params": [], "exp_avgs": [], "exp_avg_sqs": []}
        lists = (self.params, self.exp_avgs, self.exp_avg_sqs, self.retain, self.forget)
        for p, m, v, r, g in zip(*([t.double() for t in tensors] for tensors in lists), strict=True):
            delta = scale * (r + lam * g) if forget else scale * r
            m = beta1 * m + (1 - beta1) * delta
            v = beta2 * v + (1 - beta2) * delta**2
            p = p * (1 - lr * HYPER["weight_decay"])
            p = p - lr / (1 - beta1**t) * m / (v.sqrt() / (1 - beta2**t) ** 0.5 + HYPER["eps"])
            for name, value in (("params", p), ("exp_avgs", m), ("exp_avg_sqs", v)):
                result[name].append(value)
        return result


def clone(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


def assert_lists_close(actual: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want.to(got.dtype), **tolerance)


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("forget", [True, False])
def test_against_fp64(device: str, dtype: torch.dtype, gradient_dtype: torch.dtype, forget: bool) -> None:
    problem = Problem(device, dtype=dtype, gradient_dtype=gradient_dtype)
    exact = problem.exact(forget)
    problem.run(forget)
    assert problem.step == 5.0
    for name, tensors in problem.written.items():
        # The scalars are fp32 tensors, which an fp64 formula sees exactly.
        assert_lists_close(tensors, exact[name])


@pytest.mark.parametrize("moment_dtype", ["fp32", "same"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_parameters_are_rounded_once(
    device: str, dtype: torch.dtype, moment_dtype: str, assert_within_twice
) -> None:
    """The error is half an ulp of the half type: that of rounding the exact result."""
    problem = Problem(
        device, dtype=dtype, moment_dtype=torch.float32 if moment_dtype == "fp32" else dtype, gradient_dtype=dtype
    )
    exact = problem.exact()
    problem.run()
    for name, tensors in problem.written.items():
        for got, want in zip(tensors, exact[name], strict=True):
            if got.dtype == dtype:
                assert_within_twice(got, want.to(dtype), want)
            else:
                torch.testing.assert_close(got, want.float())


def test_dtypes_mixed_in_one_list(device: str) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    problem = Problem(device, [(65,)] * 4)
    problem.params = [p.to(dtype) for p, dtype in zip(problem.params, dtypes, strict=True)]
    problem.retain = [r.to(dtype) for r, dtype in zip(problem.retain, reversed(dtypes), strict=True)]
    exact = problem.exact()
    problem.run()
    assert_lists_close(problem.params, exact["params"], rtol=1e-2, atol=1e-2)
    assert_lists_close(problem.exp_avgs, exact["exp_avgs"])
    torch.testing.assert_close(problem.params[0], exact["params"][0].float())


def test_steps_equal_torch_adamw(device: str) -> None:
    problem = Problem(device)
    theirs = [torch.nn.Parameter(p.clone()) for p in problem.params]
    problem.exp_avgs = [torch.zeros_like(p) for p in problem.params]
    problem.exp_avg_sqs = [torch.zeros_like(p) for p in problem.params]
    problem.step.zero_()
    optimizer = torch.optim.AdamW(theirs, lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for _ in range(5):
        problem.retain = [torch.randn_like(p) for p in problem.params]
        for q, r, g in zip(theirs, problem.retain, problem.forget, strict=True):
            q.grad = 0.4 * (r + 0.7 * g)
        optimizer.step()
        problem.run()
    assert_lists_close(problem.params, [q.detach() for q in theirs], rtol=1e-5, atol=1e-5)


def test_nothing_changes_when_not_finite(device: str) -> None:
    problem = Problem(device, finite=False)
    for tensors in (problem.retain, problem.forget):
        for t in tensors:
            t.fill_(float("nan"))
    problem.scalars["multiplier"].fill_(float("nan"))
    ema, copies = clone(problem.params), [p.bfloat16() * 0 for p in problem.params]
    lists = [*problem.written.values(), ema, copies]
    before = [clone(tensors) for tensors in lists]
    problem.run(ema=ema, ema_decay=0.5, copies=copies)
    assert problem.step == 4.0
    for old, new in zip(before, lists, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


@pytest.mark.parametrize("copy_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ema_and_copies(device: str, copy_dtype: torch.dtype) -> None:
    problem = Problem(device)
    ema = [torch.randn_like(p) for p in problem.params]
    expected = [0.9 * e.double() + 0.1 * p for e, p in zip(ema, problem.exact()["params"], strict=True)]
    copies = [torch.empty_like(p, dtype=copy_dtype) for p in problem.params]
    problem.run(ema=ema, ema_decay=0.9, copies=copies)
    assert_lists_close(ema, expected)
    assert all(torch.equal(c, p.to(copy_dtype)) for c, p in zip(copies, problem.params, strict=True))


def test_masks(device: str) -> None:
    problem = Problem(device)
    masks = [torch.rand(p.shape, device=device) < 0.5 for p in problem.params]
    before = {name: clone(tensors) for name, tensors in problem.written.items()}
    exact = problem.exact()
    ema = [torch.zeros_like(p) for p in problem.params]
    copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in problem.params]
    problem.run(masks=[pack_mask(mask) for mask in masks], ema=ema, ema_decay=0.5, copies=copies)
    for name, tensors in problem.written.items():
        for new, old, want, mask in zip(tensors, before[name], exact[name], masks, strict=True):
            assert torch.equal(new[~mask], old[~mask])
            torch.testing.assert_close(new[mask], want[mask].to(new.dtype))
    for e, c, p in zip(ema, copies, problem.params, strict=True):
        torch.testing.assert_close(e, 0.5 * p)
        assert torch.equal(c, p.bfloat16())


def test_frozen_elements_ignore_nan_gradients(device: str) -> None:
    problem = Problem(device, [(16,)])
    problem.retain[0][3] = float("nan")
    before = problem.params[0].clone()
    problem.run(masks=[pack_mask(~problem.retain[0].isnan())])
    assert problem.params[0].isfinite().all()
    assert problem.params[0][3] == before[3]


def test_channels_last(device: str) -> None:
    """Dense tensors are updated in storage order; gradients in another layout are brought into the parameter's."""
    plain = Problem(device, [(2, 4, 6, 6)])
    other = Problem(device, [(2, 4, 6, 6)])
    masks = [torch.rand(2, 4, 6, 6, device=device) < 0.5]
    for name in ("params", "exp_avgs", "exp_avg_sqs", "retain", "forget"):
        source = getattr(plain, name)
        setattr(other, name, [t.clone(memory_format=torch.channels_last) for t in source])
    other.forget = [t.contiguous() for t in other.forget]
    plain.run(masks=[pack_mask(mask) for mask in masks])
    other.run(masks=[pack_mask(mask.to(memory_format=torch.channels_last)) for mask in masks])
    for name, tensors in plain.written.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, other.written[name], strict=True))


def test_unaligned_views(device: str) -> None:
    """Slices of one buffer, as in flattened optimizers: addresses that are no multiple of 16 bytes."""
    problem = Problem(device, [(1001,)])
    exact = problem.exact()
    for name in ("params", "exp_avgs", "exp_avg_sqs", "retain", "forget"):
        buffer = torch.zeros(1008, device=device)
        buffer[1:1002] = getattr(problem, name)[0]
        setattr(problem, name, [buffer[1:1002]])
    problem.run()
    for name, tensors in problem.written.items():
        assert_lists_close(tensors, exact[name])
        assert tensors[0]._base is not None
        assert tensors[0]._base[0] == 0.0
        assert (tensors[0]._base[1002:] == 0.0).all()


def test_thousands_of_tiny_tensors(device: str, many: int) -> None:
    problem = Problem(device, [(index % 7,) for index in range(many)])
    exact = problem.exact()
    problem.run()
    for name, tensors in problem.written.items():
        torch.testing.assert_close(torch.cat(tensors), torch.cat(exact[name]).float())


def test_empty_lists_advance_the_step(device: str) -> None:
    problem = Problem(device, [])
    problem.run()
    assert problem.step == 5.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding(device: str, dtype: torch.dtype) -> None:
    """Each result is a neighbour of the exact value, the mean over elements is the exact value, and keys matter."""
    n = 20_000
    ulp = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11  # of numbers in [0.5, 1), where the results lie

    def update(seed: int) -> Tensor:
        problem = Problem(device, [(n,)], dtype=dtype, moment_dtype=torch.float32)
        problem.params[0].fill_(0.75)
        problem.exp_avgs[0].zero_()
        problem.exp_avg_sqs[0].zero_()
        problem.retain[0].fill_(1.0)
        problem.forget[0].zero_()
        problem.scalars["lr"].fill_(0.01)
        exact = problem.exact()["params"][0]
        problem.run(rounding_key=torch.tensor([seed, 4], device=device))
        assert ((problem.params[0].double() - exact).abs() < ulp).all()
        error = (problem.params[0].double() - exact).mean()
        assert abs(error) < 5.0 * 0.5 * ulp / n**0.5
        return problem.params[0]

    first = update(1)
    assert first.unique().numel() == 2
    assert torch.equal(first, update(1))
    assert not torch.equal(first, update(2))


@pytest.mark.parametrize("value", [3e-8, -3e-8, 1e-5, -1e-5, 0.0])
def test_stochastic_rounding_of_subnormal_halves(device: str, value: float) -> None:
    problem = Problem(device, [(20_000,)], dtype=torch.float16, moment_dtype=torch.float32)
    for tensors in (problem.params, problem.exp_avg_sqs, problem.retain, problem.forget):
        tensors[0].zero_()
    # With v = 0 the step is lr / (1 - beta1^t) m / eps: choose m so that the new parameter is `value`.
    problem.exp_avgs[0].fill_(-value / 0.05 * (1 - 0.8**5) * 1e-6 / 0.8)
    problem.run(rounding_key=torch.tensor([1, 4], device=device))
    result = problem.params[0].double()
    assert ((result - value).abs() < 2.0**-24).all()
    assert abs(result.mean() - value) < 5.0 * 0.5 * 2.0**-24 / 20_000**0.5


def test_stochastic_rounding_keeps_representable_values(device: str) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 1e-3, 65280.0, float("inf")], device=device)
    for dtype in (torch.bfloat16, torch.float16):
        problem = Problem(device, [(7,)], dtype=dtype)
        problem.params = [values.to(dtype)]
        problem.scalars["lr"].zero_()
        before = problem.params[0].clone()
        problem.run(rounding_key=torch.tensor([1, 4], device=device))
        assert torch.equal(problem.params[0], before)


def test_versions_are_bumped(device: str) -> None:
    problem = Problem(device, [(4,)])
    before = problem.params[0]._version
    problem.run()
    assert problem.params[0]._version > before


def test_opcheck(device: str) -> None:
    shapes = [(3,), (4, 5)]

    def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.rand(shape, device=device).to(dtype) for shape in shapes]

    def codes(dtype: torch.dtype) -> list[Tensor]:
        return [torch.randint(1, 100, shape, device=device).to(dtype) for shape in shapes]

    empty: tuple[list[Tensor], ...] = ([], [], [], [])
    absmaxes = [torch.rand(1, device=device) for _ in range(4)]
    masks = [torch.tensor([5], dtype=torch.uint8, device=device), torch.ones(3, dtype=torch.uint8, device=device)]
    key = torch.tensor([1, 2], device=device)
    scalars = (*(scalar(value, device) for value in (0.5, 0.9, True, 0.1, 3.0)), 0.9, 0.99, 1e-8, 0.1)
    for arguments in (
        (tensors(), tensors(), tensors(), [], [], tensors(), *empty, *scalars, 0.0, None),
        (
            *(tensors(torch.bfloat16), tensors(), tensors(), [], [], tensors(), tensors(), tensors()),
            *(tensors(torch.float16), masks, *scalars, 0.9, key),
        ),
        (
            *(tensors(), codes(torch.int8), codes(torch.uint8), absmaxes[:2], absmaxes[2:], tensors(), *empty),
            *(*scalars, 0.0, None),
        ),
    ):
        torch.library.opcheck(torch.ops.erasediff.constrained_adamw_.default, arguments)


def test_bad_arguments() -> None:
    def problem() -> Problem:
        return Problem("cpu", [(3,), (4, 5)])

    bad = problem()
    bad.retain.pop()
    with pytest.raises(ValueError, match="retain has 1"):
        bad.run()
    bad = problem()
    bad.exp_avgs[1] = torch.zeros(5, 4)
    with pytest.raises(ValueError, match=r"exp_avgs\[1\]"):
        bad.run()
    bad = problem()
    bad.exp_avgs[1] = torch.zeros(5, 4).T
    with pytest.raises(ValueError, match="strides"):
        bad.run()
    bad = problem()
    bad.exp_avgs[1] = bad.exp_avgs[1].half()
    with pytest.raises(ValueError, match="float16"):
        bad.run()
    bad = problem()
    bad.params[1] = torch.zeros(4, 10)[:, ::2]
    with pytest.raises(ValueError, match="gaps"):
        bad.run()
    bad = problem()
    bad.step = torch.tensor(1)
    with pytest.raises(ValueError, match="step"):
        bad.run()
    for name, value in {"finite": torch.tensor(1.0), "lr": torch.ones(1), "multiplier": torch.tensor(1)}.items():
        bad = problem()
        bad.scalars[name] = value
        with pytest.raises(ValueError, match=name):
            bad.run()
    with pytest.raises(ValueError, match="rounding_key"):
        problem().run(rounding_key=torch.tensor([1]))
    with pytest.raises(ValueError, match="masks"):
        problem().run(masks=[torch.ones(1, dtype=torch.uint8)])
    with pytest.raises(ValueError, match="ema has 1"):
        problem().run(ema=[torch.zeros(3)])

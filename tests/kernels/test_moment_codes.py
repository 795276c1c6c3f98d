"""Moments of 8 bits in `constrained_adamw_`: the bits of the codes, and what the step makes of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from erasediff_kernels import ConstrainedAdamW, constrained_adamw_, pack_mask
from erasediff_kernels.reference import moment_codes
from erasediff_kernels.reference.moment_codes import BLOCK

SIZES = [0, 1, 3, 255, 256, 257, 1000, 8500]
HYPER = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1}


class Problem:
    """Parameters, codes and gradients for one call."""

    def __init__(self, device: str, sizes: list[int], dtype: torch.dtype = torch.float32) -> None:
        def random(to: torch.dtype) -> list[Tensor]:
            return [torch.randn(n, device=device).to(to) for n in sizes]

        self.params, self.retain, self.forget = random(dtype), random(dtype), random(dtype)
        self.exp_avgs = [torch.randint(-127, 128, (n,), device=device, dtype=torch.int8) for n in sizes]
        self.exp_avg_sqs = [torch.randint(60, 256, (n,), device=device, dtype=torch.uint8) for n in sizes]
        self.exp_avg_absmaxes, self.exp_avg_sq_absmaxes = (
            [torch.rand((n + BLOCK - 1) // BLOCK, device=device) + 0.5 for n in sizes] for _ in range(2)
        )
        self.scalars = {
            name: torch.tensor(value, device=device)
            for name, value in {"multiplier": 0.7, "clip_scale": 0.4, "finite": True, "lr": 0.05, "step": 4.0}.items()
        }

    @property
    def written(self) -> list[list[Tensor]]:
        return [self.params, self.exp_avgs, self.exp_avg_sqs, self.exp_avg_absmaxes, self.exp_avg_sq_absmaxes]

    def decoded(self) -> tuple[list[Tensor], list[Tensor]]:
        m = list(map(moment_codes.decode_signed, self.exp_avgs, self.exp_avg_absmaxes))
        return m, list(map(moment_codes.decode_unsigned, self.exp_avg_sqs, self.exp_avg_sq_absmaxes))

    def exact(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """p, m and v after the step, in fp64, from what the codes stand for now."""
        results: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        t = float(self.scalars["step"]) + 1.0
        lists = (self.params, *self.decoded(), self.retain, self.forget)
        for values in zip(*lists, strict=True):
            p, m, v, r, g = (value.double() for value in values)
            delta = self.scalars["clip_scale"].double() * (r + self.scalars["multiplier"].double() * g)
            m = HYPER["beta1"] * m + (1.0 - HYPER["beta1"]) * delta
            v = HYPER["beta2"] * v + (1.0 - HYPER["beta2"]) * delta.square()
            lr = self.scalars["lr"].double()
            root = v.sqrt() / (1.0 - HYPER["beta2"] ** t) ** 0.5 + HYPER["eps"]
            p = p * (1.0 - lr * HYPER["weight_decay"]) - lr / (1.0 - HYPER["beta1"] ** t) * m / root
            for result, value in zip(results, (p, m, v), strict=True):
                result.append(value)
        return results

    def run(self, **options: Any) -> None:
        lists = (self.params, self.exp_avgs, self.exp_avg_sqs, self.retain, self.forget)
        absmaxes = {"exp_avg_absmaxes": self.exp_avg_absmaxes, "exp_avg_sq_absmaxes": self.exp_avg_sq_absmaxes}
        constrained_adamw_(*lists, **{**self.scalars, **HYPER, **absmaxes, **options})


def test_codes_have_the_bits_of_the_reference(device: str) -> None:
    """With betas of 0 the moments are the gradient and its square, exactly: only the codes are left to differ."""
    problem = Problem(device, SIZES)
    problem.scalars |= {"clip_scale": torch.ones((), device=device), "multiplier": torch.zeros((), device=device)}
    for gradient in problem.retain:
        gradient *= torch.randn_like(gradient).mul(8.0).exp()
    special = problem.retain[-1]
    special[:BLOCK] = 0.0
    special[300:310] = torch.tensor([1e-30, -1e-38, 1e-45, 0.0, -0.0, 1e18, -1e18, 3.0, 1e-10, 1.0], device=device)
    special[2 * BLOCK : 3 * BLOCK] *= 1e-30
    special[3 * BLOCK] = float("nan")
    special[4 * BLOCK] = float("inf")
    problem.run(beta1=0.0, beta2=0.0)
    step = torch.tensor(5.0, device=device)
    for index, gradient in enumerate(problem.retain):
        codes, absmax = moment_codes.encode_signed(gradient)
        assert torch.equal(problem.exp_avgs[index], codes)
        torch.testing.assert_close(problem.exp_avg_absmaxes[index], absmax, rtol=0.0, atol=0.0, equal_nan=True)
        codes, absmax = moment_codes.encode_unsigned(gradient * gradient, step)
        assert torch.equal(problem.exp_avg_sqs[index], codes)
        torch.testing.assert_close(problem.exp_avg_sq_absmaxes[index], absmax, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_step_is_that_of_the_decoded_moments(device: str, dtype: torch.dtype) -> None:
    """The parameter sees the moments before they are rounded; a code is at most one step of its root away."""
    problem = Problem(device, SIZES, dtype)
    params, m, v = problem.exact()
    averages = [torch.zeros(n, device=device) for n in SIZES]
    copies = [torch.empty(n, device=device, dtype=torch.bfloat16) for n in SIZES]
    problem.run(ema=averages, ema_decay=0.5, copies=copies)
    new_m, new_v = problem.decoded()
    for index, p in enumerate(problem.params):
        torch.testing.assert_close(p, params[index].to(dtype))
        torch.testing.assert_close(averages[index], 0.5 * p.float())
        assert torch.equal(copies[index], p.bfloat16())
        if p.numel():
            per_element = moment_codes.per_element(problem.exp_avg_absmaxes[index].double(), p.numel())
            root = (m[index].abs() / per_element).sqrt() * m[index].sign()
            new_root = (new_m[index].abs() / per_element).sqrt() * new_m[index].sign()
            assert (root - new_root).abs().max() < 0.51 / 127.0
            per_element = moment_codes.per_element(problem.exp_avg_sq_absmaxes[index].double(), p.numel())
            assert ((v[index] / per_element) ** 0.25 - (new_v[index] / per_element) ** 0.25).abs().max() < 1.01 / 255.0


def test_stochastic_rounding_and_masks(device: str) -> None:
    problem, rounded = Problem(device, SIZES, torch.bfloat16), Problem(device, SIZES, torch.bfloat16)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "exp_avg_absmaxes", "exp_avg_sq_absmaxes", "retain", "forget"):
        setattr(rounded, name, [t.clone() for t in getattr(problem, name)])
    masks = [torch.rand(n, device=device) < 0.5 for n in SIZES]
    before, params = [p.clone() for p in problem.params], problem.exact()[0]
    old_m, _ = problem.decoded()
    problem.run(masks=[pack_mask(mask) for mask in masks])
    rounded.run(rounding_key=torch.tensor([1, 2], device=device))
    new_m, _ = problem.decoded()
    for index, mask in enumerate(masks):
        p = problem.params[index]
        assert torch.equal(p[~mask], before[index][~mask])
        torch.testing.assert_close(p[mask], params[index][mask].bfloat16())
        step_m = moment_codes.per_element(problem.exp_avg_absmaxes[index], p.numel()) * 2.0 / 127.0
        assert ((new_m[index] - old_m[index]).abs() <= step_m)[~mask].all()
        ulp = params[index].abs().clamp_min(1e-3) * 2.0**-7
        assert ((rounded.params[index].double() - params[index]).abs() <= ulp).all()
    assert not torch.equal(rounded.params[-1], params[-1].bfloat16())


def test_nothing_changes_when_not_finite(device: str) -> None:
    problem = Problem(device, SIZES)
    problem.retain[-1].fill_(float("nan"))
    problem.scalars["finite"].fill_(False)
    before = [[t.clone() for t in tensors] for tensors in problem.written]
    problem.run()
    assert problem.scalars["step"] == 4.0
    for old, new in zip(before, problem.written, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


def test_unaligned_views(device: str) -> None:
    """As slices of larger buffers, whose addresses are odd: the same bits."""
    problem, other = Problem(device, [1000]), Problem(device, [1000])
    for name in ("params", "exp_avgs", "exp_avg_sqs", "exp_avg_absmaxes", "exp_avg_sq_absmaxes", "retain", "forget"):
        tensor = getattr(problem, name)[0]
        buffer = tensor.new_zeros(tensor.numel() + 1)
        buffer[1:] = tensor
        setattr(other, name, [buffer[1:]])
    problem.run()
    other.run()
    for mine, theirs in zip(problem.written, other.written, strict=True):
        assert torch.equal(mine[0], theirs[0])


def test_the_second_moment_is_never_rounded_to_zero() -> None:
    v = torch.logspace(-37, 0, 1000)
    codes, _ = moment_codes.encode_unsigned(v, torch.tensor(3.0))
    assert codes.min() == 1
    assert moment_codes.encode_unsigned(torch.zeros(3), torch.tensor(3.0))[0].max() == 0


def test_the_dither_is_unbiased_over_steps() -> None:
    v = torch.rand(BLOCK)
    v[0] = 1.0
    roots = [moment_codes.encode_unsigned(v, torch.tensor(float(step)))[0].double() / 255.0 for step in range(1000)]
    assert (torch.stack(roots).mean(dim=0) - v.double() ** 0.25).abs().max() < 0.02 / 255.0


def test_the_second_moment_follows_gradients_that_change() -> None:
    """Changes of less than half a step add up. Rounded to nearest they are lost: mean 1.4, deviation 0.9."""
    torch.manual_seed(0)
    scale = torch.randn(2048).exp()
    param = torch.nn.Parameter(torch.zeros(2048))
    optimizer = ConstrainedAdamW([param], lr=0.0, betas=(0.9, 0.99), moments="8-bit")
    exact = torch.zeros(2048, dtype=torch.float64)
    for step in range(600):
        if step == 200:
            scale *= torch.randn(2048).exp()
        param.grad = scale * torch.randn(2048)
        optimizer.step()
        exact = 0.99 * exact + 0.01 * param.grad.double().square()
    state = optimizer.state[param]
    ratio = (moment_codes.decode_unsigned(state["exp_avg_sq"], state["exp_avg_sq_absmax"]) / exact).sqrt()
    assert abs(ratio.mean() - 1.0) < 0.03
    assert ratio.std() < 0.15


def test_bad_arguments() -> None:
    def refused(match: str, **changes: Any) -> None:
        problem = Problem("cpu", [300])
        for name, value in changes.items():
            setattr(problem, name, value)
        with pytest.raises(ValueError, match=match):
            problem.run()

    refused("exp_avgs has a tensor of torch.uint8", exp_avgs=[torch.zeros(300, dtype=torch.uint8)])
    refused("exp_avg_sqs", exp_avg_sqs=[torch.zeros(299, dtype=torch.uint8)])
    refused(r"float32 \(2,\)", exp_avg_absmaxes=[torch.zeros(1)])
    refused("0 absmaxes for 1 exp_avgs", exp_avg_absmaxes=[])
    refused("params has a tensor of torch.float64", params=[torch.zeros(300, dtype=torch.float64)])
    with pytest.raises(ValueError, match="8-bit"):
        ConstrainedAdamW([torch.nn.Parameter(torch.zeros(3))], moments="4-bit")  # type: ignore[arg-type]

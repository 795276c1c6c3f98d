import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from erasediff_kernels import constraint_multiplier, gradient_gram

BARRIERS = ["norm", "gap", "fixed", "cosine"]


def formula(rr: float, rf: float, ff: float, barrier: str, eta: float, gap: float) -> float:
    if barrier == "fixed":
        return eta
    if ff == 0.0:
        return 0.0
    if barrier == "norm":
        return max(0.0, eta - rf / ff)
    if barrier == "gap":
        return max(0.0, (eta * max(gap, 0.0) - rf) / ff)
    return max(0.0, eta - rf / math.sqrt(rr * ff)) if rr else eta


def as_gram(values: tuple[float, float, float], device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)


@pytest.mark.parametrize("max_norm", [None, 0.5, 1e6])
@pytest.mark.parametrize("gap", [-1.0, 0.0, 2.5])
@pytest.mark.parametrize("barrier", BARRIERS)
def test_formulas(device: str, barrier: str, gap: float, max_norm: float | None) -> None:
    for rr, rf, ff in [(4.0, -1.0, 3.0), (4.0, 2.0, 3.0), (0.0, 0.0, 2.0), (5.0, 0.0, 0.0), (0.0, 0.0, 0.0)]:
        gap_tensor = torch.tensor(gap, device=device) if barrier == "gap" else None
        result = constraint_multiplier(as_gram((rr, rf, ff), device), barrier, 0.3, gap=gap_tensor, max_norm=max_norm)
        multiplier = formula(rr, rf, ff, barrier, 0.3, gap)
        norm = math.sqrt(max(0.0, rr + 2.0 * multiplier * rf + multiplier**2 * ff))
        scale = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
        expected = torch.tensor([multiplier, scale, norm])
        torch.testing.assert_close(torch.stack(result[:3]).cpu(), expected)
        assert all(t.dtype == torch.float32 and t.dim() == 0 and t.device.type == device for t in result[:3])
        assert result.finite.dtype == torch.bool
        assert bool(result.finite)


@pytest.mark.parametrize("barrier", BARRIERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_finite_flag(device: str, barrier: str, bad: float) -> None:
    gap = torch.tensor(1.0, device=device) if barrier == "gap" else None
    for place in range(3):
        values = [1.0, 0.5, 2.0]
        values[place] = bad
        assert not constraint_multiplier(as_gram(tuple(values), device), barrier, gap=gap).finite
    good = as_gram((1.0, 0.5, 2.0), device)
    assert constraint_multiplier(good, barrier, gap=gap).finite
    if barrier == "gap":
        assert not constraint_multiplier(good, barrier, gap=torch.tensor(bad, device=device)).finite


def test_norm_is_never_nan_from_cancellation(device: str) -> None:
    """r = -g: the exact norm of r + g is 0, and rounding must not make it the root of a negative number."""
    value = 0.1 + 1e-17
    result = constraint_multiplier(as_gram((value, -value, value * (1 - 1e-16)), device), "fixed", 1.0)
    assert result.norm >= 0.0
    assert result.finite


vectors = st.lists(
    st.tuples(st.floats(-10.0, 10.0, width=32), st.floats(-10.0, 10.0, width=32)), min_size=1, max_size=30
)


def is_beyond_fp32(r: Tensor, g: Tensor) -> bool:
    """g is so small that no fp32 lambda can turn r against it."""
    squared = float(g.double().dot(g.double()))
    return squared > 0 and -float(r.double().dot(g.double())) / squared > torch.finfo(torch.float32).max


@settings(max_examples=100, deadline=None)
@given(pairs=vectors, eta=st.floats(0.0, 2.0))
@example(pairs=[(0.0, 0.0), (-4.0, 1.1710750758553463e-38)], eta=0.0)
def test_combination_satisfies_the_constraint(pairs: list[tuple[float, float]], eta: float) -> None:
    """<delta, g> >= eta |g|^2 for delta = r + lambda g."""
    r, g = torch.tensor(pairs).unbind(dim=1)
    result = constraint_multiplier(gradient_gram([r], [g]), "norm", eta)
    if is_beyond_fp32(r, g):
        assert not result.finite, "the update is skipped"
        return
    multiplier = result.multiplier.double()
    delta = r.double() + multiplier * g.double()
    squared = g.double().dot(g.double())
    # The multiplier is rounded to fp32.
    assert delta.dot(g.double()) >= eta * squared - 1e-6 * (multiplier * squared + eta * squared) - 1e-30


@settings(max_examples=100, deadline=None)
@given(pairs=vectors, eta=st.floats(0.0, 2.0), max_norm=st.floats(1e-3, 100.0))
@example(pairs=[(0.0, 0.0), (-4.0, 1.1710750758553463e-38)], eta=0.0, max_norm=1.0)
@example(pairs=[(0.0, 0.0), (0.0, 1.7088694642594712e-40)], eta=1.0, max_norm=1.0)
def test_clip_equals_clip_grad_norm(pairs: list[tuple[float, float]], eta: float, max_norm: float) -> None:
    r, g = torch.tensor(pairs).unbind(dim=1)
    result = constraint_multiplier(gradient_gram([r], [g]), "norm", eta, max_norm=max_norm)
    if is_beyond_fp32(r, g):
        assert not result.finite, "the update is skipped"
        return
    p = torch.nn.Parameter(torch.zeros_like(r))
    p.grad = r + result.multiplier * g
    delta = p.grad * result.clip_scale
    norm = torch.nn.utils.clip_grad_norm_([p], max_norm)
    # Cancellation in r + lambda g, and squares that underflow, cost the fp32 baseline digits that the fp64 Gram keeps.
    scale = float(r.norm() + result.multiplier * g.norm())
    torch.testing.assert_close(result.norm, norm, rtol=1e-5, atol=1e-6 * scale + 1e-18)
    torch.testing.assert_close(delta, p.grad, rtol=1e-4, atol=1e-6 * (1.0 + scale))


def test_opcheck(device: str) -> None:
    gram = as_gram((1.0, 0.5, 2.0), device)
    for arguments in (("norm", 0.1, None, None), ("gap", 0.1, torch.tensor(1.5, device=device), 2.0)):
        torch.library.opcheck(torch.ops.erasediff.constraint_multiplier.default, (gram, *arguments))


def test_bad_arguments() -> None:
    gram = as_gram((1.0, 0.0, 1.0), "cpu")
    with pytest.raises(ValueError, match="barrier"):
        constraint_multiplier(gram, "hard")
    with pytest.raises(ValueError, match="gradient_gram"):
        constraint_multiplier(gram.float())
    with pytest.raises(ValueError, match="gap"):
        constraint_multiplier(gram, "gap")
    with pytest.raises(ValueError, match="gap"):
        constraint_multiplier(gram, "norm", gap=torch.tensor(1.0))
    with pytest.raises(ValueError, match="0-D"):
        constraint_multiplier(gram, "gap", gap=torch.ones(2))
    with pytest.raises(ValueError, match="max_norm"):
        constraint_multiplier(gram, max_norm=0.0)

"""Norm, clip scale and finiteness of a r + b g against the gradients themselves, and the update that follows it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from erasediff_kernels import (
    ConstrainedAdamW,
    ConstrainedSGD,
    clip_combination,
    constraint_multiplier,
    gradient_gram,
)

SHAPES = [(3,), (5, 7), (1000,)]
# Among them no retain gradient, none of the forget gradient, and ascent on it.
COEFFICIENTS = [(1.0, 0.7), (0.25, 3.0), (0.0, 1.0), (2.0, 0.0), (0.0, 0.0), (1.5, -0.5)]


def randoms(device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, device=device).to(dtype) for shape in SHAPES]


def pair(a: float, b: float, device: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([a, b], dtype=dtype, device=device)


@pytest.mark.parametrize("max_norm", [None, 0.5, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("a", "b"), COEFFICIENTS)
def test_against_the_combination_itself(
    device: str, a: float, b: float, dtype: torch.dtype, max_norm: float | None
) -> None:
    retain, forget = randoms(device), randoms(device)
    result = clip_combination(gradient_gram(retain, forget), pair(a, b, device, dtype), max_norm=max_norm)
    squares = [(a * r.double() + b * g.double()).square().sum() for r, g in zip(retain, forget, strict=True)]
    norm = float(torch.stack(squares).sum().sqrt())
    scale = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
    torch.testing.assert_close(result.norm.cpu(), torch.tensor(norm), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.clip_scale.cpu(), torch.tensor(scale), rtol=1e-6, atol=0.0)
    assert torch.equal(result.multiplier, pair(a, b, device, torch.float32))
    assert bool(result.finite)
    assert [t.dtype for t in result] == [torch.float32] * 3 + [torch.bool]


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("barrier", ["norm", "fixed", "cosine"])
def test_one_and_lambda_give_the_bits_of_the_constraint(device: str, barrier: str, max_norm: float | None) -> None:
    gram = gradient_gram(randoms(device), randoms(device))
    expected = constraint_multiplier(gram, barrier, 0.3, max_norm=max_norm)
    coefficients = torch.stack((torch.ones_like(expected.multiplier), expected.multiplier))
    result = clip_combination(gram, coefficients, max_norm=max_norm)
    assert torch.equal(result.multiplier[1], expected.multiplier)
    for ours, theirs in zip(result[1:], expected[1:], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_finite_flag(device: str, bad: float) -> None:
    good = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64, device=device)
    for index in range(3):
        gram = good.clone()
        gram[index] = bad
        assert not clip_combination(gram, pair(1.0, 1.0, device)).finite
    for a, b in ((bad, 1.0), (1.0, bad), (1e300, 1.0)):
        assert not clip_combination(good, pair(a, b, device)).finite
        assert not clip_combination(torch.zeros_like(good), pair(a, b, device)).finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_forget", [True, False])
@pytest.mark.parametrize(("a", "b"), COEFFICIENTS)
@pytest.mark.parametrize("kind", [ConstrainedAdamW, ConstrainedSGD])
def test_update_follows_the_combination(
    device: str, kind: type, a: float, b: float, with_forget: bool, dtype: torch.dtype
) -> None:
    """The step with (a, b) is the plain step whose gradient is clip_scale (a r + b g)."""
    start, retain, forget = randoms(device, dtype), randoms(device), randoms(device) if with_forget else []
    constraint = clip_combination(gradient_gram(retain, forget), pair(a, b, device), max_norm=2.0)
    deltas = [
        a * r.double() + (b * g.double() if with_forget else 0.0) for r, g in zip(retain, forget or retain, strict=True)
    ]
    deltas = [(constraint.clip_scale * delta).to(torch.promote_types(dtype, torch.float32)) for delta in deltas]
    results = []
    for gradients, each in (
        ((retain, forget), constraint),
        ((deltas, []), constraint_multiplier(gradient_gram(deltas, []))),
    ):
        params = [torch.nn.Parameter(t.clone()) for t in start]
        kind(params, lr=0.1, **({"eps": 1e-3} if kind is ConstrainedAdamW else {})).constrained_step(*gradients, each)
        results.append(params)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("kind", [ConstrainedAdamW, ConstrainedSGD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_update_with_one_and_lambda_has_the_bits_of_the_multiplier(
    backend: Any, device: str, kind: type, dtype: torch.dtype
) -> None:
    start, retain, forget = randoms(device, dtype), randoms(device), randoms(device)
    gram = gradient_gram(retain, forget)
    constraint = constraint_multiplier(gram, "norm", 0.3, max_norm=1.0)
    both = clip_combination(gram, torch.stack((torch.ones_like(constraint[0]), constraint[0])), max_norm=1.0)
    results = []
    for each in (constraint, both):
        params = [torch.nn.Parameter(t.clone()) for t in start]
        optimizer = kind(params, lr=0.1)
        for _ in range(2):
            optimizer.constrained_step(retain, forget, each)
        results.append(params)
    for p, q in zip(*results, strict=True):
        if backend.name == "triton":  # whose compiler may fuse the product with 1 into a sum
            torch.testing.assert_close(p, q)
        else:
            assert torch.equal(p, q)


def test_opcheck(device: str) -> None:
    gram = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64, device=device)
    for dtype, max_norm in ((torch.float64, None), (torch.float32, 2.0)):
        arguments = (gram, pair(0.5, 2.0, device, dtype), max_norm)
        torch.library.opcheck(torch.ops.erasediff.clip_combination.default, arguments)


def test_bad_arguments() -> None:
    gram = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="gradient_gram"):
        clip_combination(gram.float(), pair(1.0, 1.0, "cpu"))
    for wrong in (torch.ones(3), torch.ones(()), torch.ones(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"give \(a, b\)"):
            clip_combination(gram, wrong)
    with pytest.raises(ValueError, match="max_norm"):
        clip_combination(gram, pair(1.0, 1.0, "cpu"), max_norm=-1.0)
    params = [torch.nn.Parameter(torch.ones(3))]
    constraint = clip_combination(gram, pair(1.0, 1.0, "cpu"))
    for wrong in (torch.ones(3), torch.ones(2, 2), torch.ones(2).half(), torch.ones(4)[::2]):
        with pytest.raises(ValueError, match="multiplier is"):
            ConstrainedSGD(params, 0.1).constrained_step([torch.ones(3)], [], constraint._replace(multiplier=wrong))

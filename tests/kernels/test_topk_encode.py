from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from erasediff_kernels import topk_encode

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(0, 5, 2), (1, 1, 1), (3, 7, 7), (4, 33, 5), (2, 1023, 32), (1, 2500, 64), (1, 1100, 1024)]


@pytest.fixture
def dtypes(backend: Any) -> list[torch.dtype]:
    """Triton sorts 32 bits of a value. Its interpreter takes seconds for float16, which differs in a cast."""
    if backend.name != "triton":
        return DTYPES
    return DTYPES[:2] if backend.device == "cpu" else DTYPES[:3]


def expected(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By a stable sort of Python's, row by row."""
    relu = x.double().cpu().clamp_min(0.0)
    order = torch.tensor([sorted(range(x.shape[1]), key=lambda i: -row[i])[:k] for row in relu.tolist()])
    order = order.reshape(-1, k).long()
    return relu.gather(1, order), order


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_sorting(device: str, dtypes: list[torch.dtype], shape: tuple[int, int, int]) -> None:
    rows, latents, k = shape
    for dtype in dtypes:
        x = torch.randn(rows, latents, device=device).to(dtype)
        values, indices = topk_encode(x, k)
        assert (values.dtype, indices.dtype) == (dtype, torch.int32)
        expected_values, expected_indices = expected(x, k)
        assert torch.equal(values.double().cpu(), expected_values)
        assert torch.equal(indices.long().cpu(), expected_indices)


def test_ties_go_to_the_lower_index(device: str) -> None:
    """Coarse values, so that nearly all are tied, and rows with fewer than k positive ones."""
    x = torch.randint(-8, 3, (3, 1500), device=device).float()
    x[0] = -1.0
    x[1, 1000:] = 2.0
    values, indices = topk_encode(x, 40)
    expected_values, expected_indices = expected(x, 40)
    assert torch.equal(values.double().cpu(), expected_values)
    assert torch.equal(indices.long().cpu(), expected_indices)
    assert indices[0].tolist() == list(range(40))
    assert values[0].tolist() == [0.0] * 40


def test_negative_zero_is_zero_and_the_smallest_number_is_not(device: str) -> None:
    smallest = torch.finfo(torch.float32).smallest_normal
    x = torch.tensor([[-0.0, 0.0, smallest, -1.0]], device=device)
    values, indices = topk_encode(x, 3)
    assert indices.tolist() == [[2, 0, 1]]
    assert values.tolist() == [[smallest, 0.0, 0.0]]


def test_nan_and_infinity_are_kept(device: str) -> None:
    x = torch.zeros(1, 900, device=device)
    x[0, 100], x[0, 500], x[0, 700], x[0, 800] = 3.0, float("nan"), float("inf"), float("-inf")
    values, indices = topk_encode(x, 3)
    assert indices.tolist() == [[500, 700, 100]]
    assert values[0, 0].isnan()
    assert values[0, 1:].tolist() == [float("inf"), 3.0]


def test_strides(device: str) -> None:
    x = torch.randn(40, 6, device=device)
    for a, b in zip(topk_encode(x.T, 4), topk_encode(x.T.contiguous(), 4), strict=True):
        assert torch.equal(a, b)


def test_gradcheck(dtypes: list[torch.dtype], device: str) -> None:
    if torch.float64 not in dtypes:
        pytest.skip("gradcheck is in float64")
    x = torch.randn(3, 9, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: topk_encode(x, 4).values, x)


def test_gradient_reaches_what_was_kept_and_positive(device: str) -> None:
    x = torch.tensor([[1.0, -1.0, 3.0, 2.0], [-1.0, -2.0, 5.0, -3.0]], device=device, requires_grad=True)
    topk_encode(x, 2).values.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]]


def test_compiled_by_torch(device: str) -> None:
    run: Callable[[Tensor], Tensor] = torch.compile(
        lambda x: topk_encode(x, 3).values.square().sum(), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(4, 20, device=device, requires_grad=True)
    (compiled,) = torch.autograd.grad(run(x), x)
    (eager,) = torch.autograd.grad(topk_encode(x, 3).values.square().sum(), x)
    assert torch.equal(compiled, eager)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device: str, requires_grad: bool) -> None:
    preactivations = torch.randn(2, 15, device=device, requires_grad=requires_grad)
    torch.library.opcheck(torch.ops.erasediff.topk_encode.default, (preactivations, 4))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="flatten"):
        topk_encode(torch.zeros(2, 3, 4), 1)
    with pytest.raises(ValueError, match=r"1 \.\. 3"):
        topk_encode(torch.zeros(2, 3), 4)
    with pytest.raises(ValueError, match=r"1 \.\. 1024"):
        topk_encode(torch.zeros(2, 3000), 2000)
    with pytest.raises(ValueError, match="int64"):
        topk_encode(torch.zeros(2, 3, dtype=torch.int64), 2)

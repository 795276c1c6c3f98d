"""`sparse_decode`, and `gather_dot` and `scatter_outer` of its backward pass, against the dense products in fp64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from erasediff_kernels import gather_dot, scatter_outer, sparse_decode
from erasediff_kernels.ops.scatter_outer import group_by_latent

HALVES = [torch.bfloat16, torch.float16]
# (N, k, n, d): d not a multiple of a vector, larger than a tile, and one latent for all.
SHAPES = [(0, 3, 5, 4), (1, 1, 1, 1), (5, 4, 9, 7), (3, 6, 40, 128), (4, 32, 50, 650), (9, 2, 3, 264)]


def code(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values, indices (with repetitions in some rows), weight, rows."""
    rows, k, latents, dim = shape
    values = torch.rand(rows, k, device=device).to(dtype)
    indices = torch.randint(latents, (rows, k), device=device, dtype=torch.int32)
    weight = torch.randn(latents, dim, device=device).to(dtype)
    return values, indices, weight, torch.randn(rows, dim, device=device).to(dtype)


def dense(values: Tensor, indices: Tensor, latents: int) -> Tensor:
    z = torch.zeros(values.shape[0], latents, dtype=values.dtype, device=values.device)
    return z.scatter_add(1, indices.long(), values)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_against_dense_products(device: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    values, indices, weight, rows = code(shape, dtype, device)
    bias = torch.randn(shape[3], device=device).to(dtype)
    z, w, g = dense(values.double(), indices, shape[2]), weight.double(), rows.double()
    results = {
        "decode": (sparse_decode(values, indices, weight, bias), z @ w + bias.double()),
        "no bias": (sparse_decode(values, indices, weight), z @ w),
        "dot": (gather_dot(rows, indices, weight), (g @ w.T).gather(1, indices.long())),
        "outer": (scatter_outer(values, indices, rows, shape[2]), z.T @ g),
    }
    for result, exact in results.values():
        assert result.dtype == dtype
        assert result.is_contiguous()
        torch.testing.assert_close(result, exact.to(dtype), rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_halves(device: str, dtype: torch.dtype, assert_within_twice: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    shape = (6, 16, 30, 200)
    values, indices, weight, rows = code(shape, dtype, device)
    z = dense(values.double(), indices, shape[2])
    assert_within_twice(sparse_decode(values, indices, weight), z.to(dtype) @ weight, z @ weight.double())
    exact = (rows.double() @ weight.double().T).gather(1, indices.long())
    assert_within_twice(gather_dot(rows, indices, weight), (rows @ weight.T).gather(1, indices.long()), exact)
    outer = scatter_outer(values, indices, rows, shape[2])
    assert_within_twice(outer, z.to(dtype).T @ rows, z.T @ rows.double())


def test_latents_without_entries_get_zeros(device: str) -> None:
    values, rows = torch.ones(2, 2, device=device), torch.ones(2, 300, device=device)
    indices = torch.tensor([[1, 4], [4, 1]], device=device, dtype=torch.int32)
    outer = scatter_outer(values, indices, rows, 6)
    assert outer.sum(dim=1).tolist() == [0.0, 600.0, 0.0, 0.0, 600.0, 0.0]


@pytest.mark.parametrize("dim", [40, 7, 1100])
def test_latents_that_occur_much_more_often_than_others(device: str, dim: int) -> None:
    """Their sums come from many pieces; others begin or end where a piece does."""
    counts = [0, 700, 1, 0, 255, 256, 3, 512, 1, 320, 0]
    latents = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    indices = latents[torch.randperm(len(latents))].view(-1, 4).to(device, torch.int32)
    values = torch.rand(indices.shape, device=device)
    rows = torch.randn(len(indices), dim, device=device)
    exact = torch.zeros(len(counts), dim, dtype=torch.float64, device=device)
    entries = (values.double()[:, :, None] * rows.double()[:, None]).flatten(0, 1)
    exact.index_add_(0, indices.flatten().long(), entries)
    torch.testing.assert_close(scatter_outer(values, indices, rows, len(counts)), exact.float(), rtol=1e-5, atol=1e-4)


def test_strides(device: str) -> None:
    values, indices, weight, rows = code((6, 6, 8, 6), torch.float32, device)
    decoding, dots = (values.T, indices.T, weight.T.contiguous().T), (rows.T, indices.T, weight.T.contiguous().T)
    for function, arguments in ((sparse_decode, decoding), (gather_dot, dots)):
        torch.testing.assert_close(function(*arguments), function(*(tensor.contiguous() for tensor in arguments)))
    outer = scatter_outer(values.T, indices.T, rows.T, 8)
    torch.testing.assert_close(outer, scatter_outer(*(t.T.contiguous() for t in (values, indices, rows)), 8))


def test_same_bits_from_run_to_run(device: str) -> None:
    values, indices, weight, rows = code((50, 8, 12, 70), torch.float32, device)
    first = sparse_decode(values, indices, weight), scatter_outer(values, indices, rows, 12)
    for _ in range(3):
        assert torch.equal(sparse_decode(values, indices, weight), first[0])
        assert torch.equal(scatter_outer(values, indices, rows, 12), first[1])


def test_gradcheck(device: str) -> None:
    values, indices, weight, _ = code((3, 2, 4, 5), torch.float64, device)
    bias = torch.randn(5, dtype=torch.float64, device=device)
    leaves = [tensor.requires_grad_() for tensor in (values, weight, bias)]
    assert torch.autograd.gradcheck(lambda v, w, b: sparse_decode(v, indices, w, b), leaves)


def test_gradients_are_those_of_the_dense_product(device: str) -> None:
    values, indices, weight, rows = code((40, 5, 30, 129), torch.float32, device)
    indices = torch.stack([torch.randperm(30, device=device)[:5] for _ in range(40)]).int()
    leaves = [values.requires_grad_(), weight.requires_grad_()]
    ours = torch.autograd.grad((sparse_decode(values, indices, weight) * rows).sum(), leaves)
    exact = torch.autograd.grad((dense(values, indices, 30) @ weight * rows).sum(), leaves)
    for gradient, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-4)


def test_compiled_by_torch(device: str) -> None:
    values, indices, weight, _ = code((4, 3, 6, 5), torch.float32, device)
    leaves = [values.requires_grad_(), weight.requires_grad_()]

    def loss(values: Tensor, weight: Tensor) -> Tensor:
        return sparse_decode(values, indices, weight).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device: str, requires_grad: bool) -> None:
    values, indices, weight, rows = code((2, 3, 7, 5), torch.float32, device)
    torch.library.opcheck(torch.ops.erasediff.gather_dot.default, (rows, indices, weight))
    grouped = group_by_latent(indices, 7)
    torch.library.opcheck(torch.ops.erasediff.scatter_outer.default, (values, rows, *grouped))
    leaves = (values.requires_grad_(requires_grad), indices, weight.requires_grad_(requires_grad))
    for bias in (None, torch.randn(5, device=device, requires_grad=requires_grad)):
        torch.library.opcheck(torch.ops.erasediff.sparse_decode.default, (*leaves, bias))


def test_index_out_of_range_is_an_error_on_the_cpu() -> None:
    values, weight = torch.ones(1, 1), torch.ones(3, 4)
    for bad in (3, -1):
        with pytest.raises((RuntimeError, IndexError)):
            sparse_decode(values, torch.tensor([[bad]], dtype=torch.int32), weight)
        with pytest.raises((RuntimeError, IndexError)):
            gather_dot(torch.ones(1, 4), torch.tensor([[bad]], dtype=torch.int32), weight)
        with pytest.raises((RuntimeError, IndexError)):
            scatter_outer(values, torch.tensor([[bad]], dtype=torch.int32), torch.ones(1, 4), 3)


def test_bad_arguments() -> None:
    values, indices, weight, rows = code((2, 3, 4, 5), torch.float32, "cpu")
    with pytest.raises(ValueError, match="int32"):
        sparse_decode(values, indices.long(), weight)
    with pytest.raises(ValueError, match="both must be"):
        sparse_decode(values[:, :2], indices, weight)
    with pytest.raises(ValueError, match="bfloat16"):
        sparse_decode(values, indices, weight.bfloat16())
    with pytest.raises(ValueError, match="bias"):
        sparse_decode(values, indices, weight, torch.zeros(4))
    with pytest.raises(ValueError, match="make them equal"):
        gather_dot(rows[:, :4], indices, weight)
    with pytest.raises(ValueError, match="one row for each"):
        scatter_outer(values, indices, rows[:1], 4)

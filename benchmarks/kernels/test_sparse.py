"""The operators of sparse codes beside what torch alone would run, at the size of SAeUron's autoencoder (2501.18052).

The floor of each is its FLOPs, and the bytes of every row of the weight that its codes name, read once for each entry.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_operators import BACKENDS, DEVICE, DTYPES, measure
from torch import Tensor
from torch.nn import functional

import erasediff_kernels as kernels

WIDTH, LATENTS, K = 1280, 20480, 32
ROWS = 16384 if DEVICE == "cuda" else 2048
ENTRIES = ROWS * K
CONTENDERS = (*(backend for backend in BACKENDS if backend != "reference"), "torch")
DENSE_FLOPS = 2 * ROWS * LATENTS * WIDTH

pytestmark = pytest.mark.parametrize("dtype", DTYPES)
contenders = pytest.mark.parametrize("backend", CONTENDERS)


def compare(
    benchmark: Any,
    backend: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    *,
    moved_bytes: int,
    flops: int,
) -> None:
    """`backend` is one of ours, or the name of another way to do it."""
    run, forced = (ours, backend) if backend in BACKENDS else (theirs, BACKENDS[0])
    measure(benchmark, forced, moved_bytes, run, rounds=5, numel=ENTRIES, flops=flops, dense_flops=DENSE_FLOPS)


def matrix(rows: int, columns: int, dtype: str) -> Tensor:
    return torch.randn(rows, columns, device=DEVICE).to(DTYPES[dtype])


def code(dtype: str) -> kernels.SparseCode:
    """Latents as they come: some of them much more often than others."""
    often = torch.randn(LATENTS, device=DEVICE)
    return kernels.topk_encode((torch.randn(ROWS, LATENTS, device=DEVICE) + often).to(DTYPES[dtype]), K)


def dense(sparse: kernels.SparseCode) -> Tensor:
    z = sparse.values.new_zeros(ROWS, LATENTS)
    return z.scatter_(1, sparse.indices.long(), sparse.values)


@contenders
def test_topk_encode(benchmark: Any, backend: str, dtype: str) -> None:
    preactivations = matrix(ROWS, LATENTS, dtype)
    compare(
        benchmark,
        backend,
        lambda: kernels.topk_encode(preactivations, K),
        lambda: preactivations.relu().topk(K, dim=1),
        moved_bytes=preactivations.nbytes + ENTRIES * (preactivations.itemsize + 4),
        flops=0,
    )


@pytest.mark.parametrize("backend", [*CONTENDERS, "torch embedding_bag"])
def test_sparse_decode(benchmark: Any, backend: str, dtype: str) -> None:
    sparse, weight = code(dtype), matrix(LATENTS, WIDTH, dtype)
    z = dense(sparse)

    def embedding_bag() -> Tensor:
        return functional.embedding_bag(sparse.indices, weight, mode="sum", per_sample_weights=sparse.values)

    compare(
        benchmark,
        backend,
        lambda: kernels.sparse_decode(sparse.values, sparse.indices, weight),
        embedding_bag if backend == "torch embedding_bag" else lambda: z @ weight,
        moved_bytes=(ENTRIES + ROWS) * WIDTH * weight.itemsize,
        flops=2 * ENTRIES * WIDTH,
    )


@contenders
def test_gather_dot(benchmark: Any, backend: str, dtype: str) -> None:
    sparse, weight, rows = code(dtype), matrix(LATENTS, WIDTH, dtype), matrix(ROWS, WIDTH, dtype)
    indices = sparse.indices.long()
    compare(
        benchmark,
        backend,
        lambda: kernels.gather_dot(rows, sparse.indices, weight),
        lambda: (rows @ weight.T).gather(1, indices),
        moved_bytes=(ENTRIES + ROWS) * WIDTH * weight.itemsize,
        flops=2 * ENTRIES * WIDTH,
    )


@contenders
def test_scatter_outer(benchmark: Any, backend: str, dtype: str) -> None:
    sparse, rows = code(dtype), matrix(ROWS, WIDTH, dtype)
    z = dense(sparse)
    compare(
        benchmark,
        backend,
        lambda: kernels.scatter_outer(sparse.values, sparse.indices, rows, LATENTS),
        lambda: z.T @ rows,
        moved_bytes=(ENTRIES + LATENTS) * WIDTH * rows.itemsize,
        flops=2 * ENTRIES * WIDTH,
    )

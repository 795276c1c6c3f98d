"""Each operator on each backend that runs here, by pytest-benchmark; `run.py` turns its report into JSON lines."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import erasediff_kernels as kernels
from erasediff_kernels import _dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ELEMENTS = 1 << (26 if DEVICE == "cuda" else 23)
BACKENDS = tuple(name for name in _dispatch.PREFERENCE[DEVICE] if DEVICE in _dispatch.devices(name))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

pytestmark = [
    pytest.mark.parametrize("backend", BACKENDS),
    pytest.mark.parametrize("dtype", DTYPES),
]


def measure(
    benchmark: Any, backend: str, moved_bytes: int, run: Callable[[], object], rounds: int = 10, **facts: int
) -> None:
    def once() -> None:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    with kernels.use_backend(backend):
        once()
        benchmark.extra_info.update({"numel": ELEMENTS, **facts}, moved_bytes=moved_bytes, device=DEVICE)
        benchmark.pedantic(once, rounds=rounds, warmup_rounds=1)


def batch(dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """[16, ...] of data, with alpha and sigma."""
    data = torch.randn(16, ELEMENTS // 16, device=DEVICE).to(DTYPES[dtype])
    alpha = torch.rand(16, device=DEVICE)
    return data, alpha, (1.0 - alpha.square()).sqrt()


def address() -> dict[str, Tensor]:
    return {"sample_ids": torch.arange(16, device=DEVICE), "key": torch.tensor([1, 2], device=DEVICE)}


def test_philox_noise(benchmark: Any, backend: str, dtype: str) -> None:
    draw = address()
    moved = ELEMENTS * DTYPES[dtype].itemsize
    shape = (ELEMENTS // 16,)
    measure(benchmark, backend, moved, lambda: kernels.philox_noise(**draw, role=0, shape=shape, dtype=DTYPES[dtype]))


def test_add_noise(benchmark: Any, backend: str, dtype: str) -> None:
    sample, alpha, sigma = batch(dtype)
    draw = address()
    measure(benchmark, backend, 2 * sample.nbytes, lambda: kernels.add_noise(sample, alpha, sigma, **draw))


def test_denoising_loss(benchmark: Any, backend: str, dtype: str) -> None:
    sample, alpha, sigma = batch(dtype)
    prediction = torch.randn_like(sample)
    draw = address()
    measure(
        benchmark,
        backend,
        3 * sample.nbytes,
        lambda: kernels.denoising_loss(prediction, sample, alpha, sigma, prediction_type="v_prediction", **draw),
    )


def test_deviation_loss(benchmark: Any, backend: str, dtype: str) -> None:
    prediction, _, _ = batch(dtype)
    draw = address()
    measure(benchmark, backend, 2 * prediction.nbytes, lambda: kernels.deviation_loss(prediction, **draw))


def gradients(dtype: str) -> list[Tensor]:
    return [torch.randn(ELEMENTS // 8, device=DEVICE).to(DTYPES[dtype]) for _ in range(8)]


def test_gradient_gram(benchmark: Any, backend: str, dtype: str) -> None:
    retain, forget = gradients(dtype), gradients(dtype)
    moved = sum(t.nbytes for t in retain + forget)
    measure(benchmark, backend, moved, lambda: kernels.gradient_gram(retain, forget))


def test_constrained_adamw_(benchmark: Any, backend: str, dtype: str) -> None:
    params, retain, forget = gradients(dtype), gradients(dtype), gradients(dtype)
    exp_avgs, exp_avg_sqs = ([torch.zeros_like(p, dtype=torch.float32) for p in params] for _ in range(2))
    multiplier, clip_scale, _, finite = kernels.constraint_multiplier(kernels.gradient_gram(retain, forget))
    lr, step = torch.tensor(1e-6, device=DEVICE), torch.zeros((), device=DEVICE)
    moved = sum(t.nbytes for t in retain + forget) + 2 * sum(t.nbytes for t in params + exp_avgs + exp_avg_sqs)
    scalars = {"multiplier": multiplier, "clip_scale": clip_scale, "finite": finite, "lr": lr, "step": step}
    measure(
        benchmark,
        backend,
        moved,
        lambda: kernels.constrained_adamw_(params, exp_avgs, exp_avg_sqs, retain, forget, **scalars),
    )

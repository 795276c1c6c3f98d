"""Steps on a GPU: the host never waits for the device, and the result is that of the CPU."""

import copy

import pytest
import torch

from erasediff import Cosine, EraseDiff, Fixed, Gap, GaussianNoise, InnerSolve, Norm, Relabel, UniformNoise
from erasediff_kernels import ConstrainedAdamW

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BARRIERS = [Norm(0.3), Gap(0.5), Fixed(0.7), Cosine(0.4)]
TARGETS = [UniformNoise(), GaussianNoise(), Relabel({"class_labels": torch.tensor([0, 1, 3])})]


def name_of(value):
    return type(value).__name__


def unlearner(model, process, **options):
    optimizer = ConstrainedAdamW(model.parameters(), lr=1e-3, weight_decay=0.01, ema_decay=0.9)
    return EraseDiff(model, optimizer, process=process, inner=InnerSolve(steps=2, lr=0.05), **options)


def on_gpu(batch):
    return {name: tensor.cuda() for name, tensor in batch.items()}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=name_of)
@pytest.mark.parametrize("barrier", BARRIERS, ids=name_of)
def test_the_host_never_waits(model, process, make_batch, barrier, target, autocast):
    """CUDA itself tells of every wait, also those inside of operators."""
    method = unlearner(model.cuda(), process, barrier=barrier, target=target, autocast=autocast)
    retain, forget = on_gpu(make_batch(1)), on_gpu(make_batch(2))
    method.step(retain, forget)
    torch.cuda.set_sync_debug_mode("error")
    try:
        report = method.step(retain, forget)
        with pytest.raises(RuntimeError, match="synchroniz"):
            float(report.retain_loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert report.finite


@pytest.mark.parametrize("target", TARGETS, ids=name_of)
@pytest.mark.parametrize("barrier", BARRIERS, ids=name_of)
def test_steps_are_those_of_the_cpu(model, process, make_batch, barrier, target):
    """Noise, timesteps and targets have the same bits; what follows from them differs by rounding."""
    methods = [
        unlearner(copy.deepcopy(model).to(device), process, barrier=barrier, target=target, max_grad_norm=None)
        for device in ("cpu", "cuda")
    ]
    for step in range(5):
        retain, forget = make_batch(1, seed=step), make_batch(2, seed=50 + step)
        expected = methods[0].step(retain, forget)
        actual = methods[1].step(on_gpu(retain), on_gpu(forget))
        for name, value in expected.scalars().items():
            torch.testing.assert_close(actual.scalars()[name].cpu(), value, rtol=1e-4, atol=1e-5, msg=name)
    for first, second in zip(methods[0].model.parameters(), methods[1].model.parameters(), strict=True):
        torch.testing.assert_close(second.detach().cpu(), first.detach(), rtol=1e-4, atol=1e-4)

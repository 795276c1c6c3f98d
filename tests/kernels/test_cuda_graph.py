"""A whole constrained step captured in a CUDA graph: whatever it depends on that changes is read on the device."""

import pytest
import torch

from erasediff_kernels import _dispatch, constraint_multiplier, gradient_gram, use_backend
from erasediff_kernels.optim import ConstrainedAdamW

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = [(1000, 37), (5,), (3, 3, 8, 8), (70_001,)]


@pytest.mark.parametrize("name", ["compiled", "triton"])
def test_replays_equal_eager_steps(name: str) -> None:
    """Gradients, the learning rate, a NaN and the count of steps change between replays, and the graph follows."""
    if name not in _dispatch.available("cuda"):
        pytest.skip(f"{name} does not serve CUDA in this installation")
    weights = [torch.randn(shape, device="cuda") for shape in SHAPES]
    captured, eager = ([torch.nn.Parameter(weight.clone()) for weight in weights] for _ in range(2))
    lr = torch.tensor(1e-2, device="cuda")
    optimizers = [ConstrainedAdamW(params, lr=lr, weight_decay=0.1, ema_decay=0.9) for params in (captured, eager)]
    retain, forget = ([torch.randn_like(weight) for weight in weights] for _ in range(2))

    def step(optimizer: ConstrainedAdamW) -> torch.Tensor:
        constraint = constraint_multiplier(gradient_gram(retain, forget), "norm", 0.3, max_norm=1.0)
        optimizer.constrained_step(retain, forget, constraint)
        return constraint.norm

    def renew(index: int) -> None:
        for tensor in (*retain, *forget):
            tensor.normal_()
        if index == 2:
            retain[1][0] = torch.nan
        lr.fill_(1e-2 / (index + 1))

    with use_backend(name):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # before the capture: state is made, Triton compiles
            step(optimizers[0])
        torch.cuda.current_stream().wait_stream(stream)
        step(optimizers[1])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            norm = step(optimizers[0])
        for index in range(5):
            renew(index)
            graph.replay()
            expected = step(optimizers[1])
            assert torch.equal(norm, expected) or (norm.isnan() and expected.isnan())
    for first, second in zip(captured, eager, strict=True):
        assert torch.equal(first, second)
        for key, value in optimizers[0].state[first].items():
            assert torch.equal(value, optimizers[1].state[second][key]), key
    assert optimizers[0].param_groups[0]["step"] == optimizers[1].param_groups[0]["step"] == 5.0

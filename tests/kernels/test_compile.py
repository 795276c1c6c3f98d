"""`torch.compile(fullgraph=True)` of a whole step: opaque operators must not break the graph."""

import copy

import pytest
import torch
import torch._dynamo.config
from torch import Tensor

from erasediff_kernels import (
    add_noise,
    constrained_adamw_,
    constraint_multiplier,
    denoising_loss,
    deviation_loss,
    gradient_gram,
)


class Step:
    """Both losses, their gradients and the update of a small network."""

    def __init__(self, device: str) -> None:
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 6)).to(device)
        self.params = list(self.net.parameters())
        self.exp_avgs = [torch.zeros_like(p) for p in self.params]
        self.exp_avg_sqs = [torch.zeros_like(p) for p in self.params]
        self.step = torch.zeros((), device=device)
        self.lr = torch.tensor(0.01, device=device)

    def losses(self, sample: Tensor, ids: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = torch.full((2, sample.shape[0]), 0.7, device=sample.device)
        noised = add_noise(sample, alpha, sigma, sample_ids=ids, key=key, role=0)
        retain = denoising_loss(self.net(noised), sample, alpha, sigma, sample_ids=ids, key=key, role=0).loss
        forget = deviation_loss(self.net(noised), sample_ids=ids, key=key, role=1).loss
        return retain, forget

    def update(self, retain: tuple[Tensor, ...], forget: tuple[Tensor, ...]) -> Tensor:
        constraint = constraint_multiplier(gradient_gram(retain, forget), "norm", 0.5, max_norm=1.0)
        constrained_adamw_(
            [p.detach() for p in self.params],
            self.exp_avgs,
            self.exp_avg_sqs,
            retain,
            forget,
            multiplier=constraint.multiplier,
            clip_scale=constraint.clip_scale,
            finite=constraint.finite,
            lr=self.lr,
            step=self.step,
        )
        return constraint.norm

    def __call__(self, sample: Tensor, ids: Tensor, key: Tensor) -> Tensor:
        retain, forget = self.losses(sample, ids, key)
        return self.update(torch.autograd.grad(retain, self.params), torch.autograd.grad(forget, self.params))


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch.compile cannot trace autograd.grad"
)
@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_whole_step(device: str) -> None:
    eager = Step(device)
    compiled = copy.deepcopy(eager)
    ids, key = torch.arange(8, device=device), torch.tensor([1, 2], device=device)
    sample = torch.randn(8, 6, device=device)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(run(sample, ids, key), eager(sample, ids, key))
    assert compiled.step == eager.step == 2.0
    for p, q in zip(compiled.params, eager.params, strict=True):
        torch.testing.assert_close(p, q)


def test_losses_and_update_apart(device: str) -> None:
    """The same in two graphs, with autograd between them, as any torch can compile it."""
    eager = Step(device)
    compiled = copy.deepcopy(eager)
    ids, key = torch.arange(8, device=device), torch.tensor([1, 2], device=device)
    sample = torch.randn(8, 6, device=device)
    losses = torch.compile(compiled.losses, fullgraph=True, backend="aot_eager")
    update = torch.compile(compiled.update, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        both = losses(sample, ids, key)
        gradients = [torch.autograd.grad(loss, compiled.params, retain_graph=True) for loss in both]
        torch.testing.assert_close(update(*gradients), eager(sample, ids, key))
    for p, q in zip(compiled.params, eager.params, strict=True):
        torch.testing.assert_close(p, q)

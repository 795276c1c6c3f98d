"""The value function's inner minimisation: phi_K, K steps of SGD on L_f from theta, on a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from erasediff.parallel.gradient_store import GradientStore


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerSolve:
    """K plain SGD steps at their own learning rate, begun again from theta every ``refresh_every`` outer steps.

    (arXiv 2401.05779, Algorithm 1; BOME keeps a separate SGD for it.)
    """

    steps: int = 1
    lr: float = 1e-3
    refresh_every: int = 1

    def __post_init__(self) -> None:
        if self.steps < 0 or self.refresh_every < 1 or not self.lr > 0:
            raise ValueError(f"InnerSolve needs steps >= 0, refresh_every >= 1 and lr > 0, got {self}")


class InnerCopy:
    """phi, the weights that the inner solve moves: a copy of this process's share of the trained ones.

    The model computes with phi while it stands in the place of theta, whose bits come back afterwards. Nothing of the
    inner solve reaches the optimizer's moments or the global random state.
    """

    def __init__(self, gradients: GradientStore, settings: InnerSolve) -> None:
        self.settings = settings
        self.gradients = gradients
        self.weights = [weight.clone() for weight in gradients.weights()]

    @contextmanager
    def in_place_of_the_weights(self) -> Iterator[None]:
        """The model's weights are phi within the block, and theta again after it; phi keeps what the block makes of it.

        Where they are exchanged nothing is allocated: ``weights`` holds theta within the block.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def minimise(self, gradient: Callable[[], list[Tensor]]) -> None:
        """K steps of phi <- phi - lr grad L_f(phi), from theta; ``gradient`` is that of one batch. Within the block."""
        phi = self.gradients.weights()
        torch._foreach_copy_(phi, self.weights)
        self.gradients.refresh()
        for _ in range(self.settings.steps):
            of_phi = gradient()
            torch._foreach_add_(phi, of_phi, alpha=-self.settings.lr)
            self.gradients.release(of_phi)
            self.gradients.refresh()

    @torch.no_grad()
    def load(self, weights: list[Tensor]) -> None:
        """Restores ``weights``."""
        torch._foreach_copy_(self.weights, weights)

    @torch.no_grad()
    def _exchange(self) -> None:
        for weight, other in zip(self.gradients.weights(), self.weights, strict=True):
            kept = weight.clone()
            weight.copy_(other)
            other.copy_(kept)
        self.gradients.refresh()

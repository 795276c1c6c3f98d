"""Inner solve of the value function: phi_K, K steps of SGD on L_f from theta, on a copy of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from erasediff.parallel.gradient_store import GradientStore


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerSolve:
    """Settings of the inner solve (arXiv 2401.05779, Algorithm 1; BOME, arXiv 2209.08709, keeps a separate SGD too).

    Attributes:
        steps: K, plain SGD steps from theta; 0 leaves phi at theta.
        lr: their learning rate.
        refresh_every: outer steps after which phi begins again from theta.

    Raises:
        ValueError: for numbers out of range.
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

    Args:
        gradients: the store of the trained model.
        settings: of the inner solve.
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
        """Take K steps of phi <- phi - lr grad L_f(phi), from theta; called within the block.

        Args:
            gradient: grad L_f at the model's weights, one tensor for each of ``GradientStore.weights``.
        """
        phi = self.gradients.weights()
        torch._foreach_copy_(phi, self.weights)
        self.gradients.refresh()
        for _ in range(self.settings.steps):
            phi_gradient = gradient()
            torch._foreach_add_(phi, phi_gradient, alpha=-self.settings.lr)
            self.gradients.release(phi_gradient)
            self.gradients.refresh()

    @torch.no_grad()
    def load(self, weights: list[Tensor]) -> None:
        """Restore ``weights``."""
        torch._foreach_copy_(self.weights, weights)

    @torch.no_grad()
    def _exchange(self) -> None:
        for weight, other in zip(self.gradients.weights(), self.weights, strict=True):
            previous = weight.clone()
            weight.copy_(other)
            other.copy_(previous)
        self.gradients.refresh()

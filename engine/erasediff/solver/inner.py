"""The value function's inner minimisation: phi_K, K steps of SGD on L_f from theta, on a copy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


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
    """phi, the copy of the model that the inner solve moves.

    The copy has its own optimizer and its own gradients, so nothing of the inner solve reaches theta, its optimizer's
    moments or the global random state.
    """

    def __init__(self, model: nn.Module, settings: InnerSolve) -> None:
        self.settings = settings
        self.model = copy.deepcopy(model)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def restart(self, model: nn.Module) -> None:
        """phi <- theta."""
        torch._foreach_copy_(_values(self.model), _values(model))

    def minimise(self, model: nn.Module, forget_loss: Callable[[nn.Module, Callable[[Tensor], None]], Tensor]) -> None:
        """K steps of phi <- phi - lr grad L_f(phi), from theta; ``forget_loss(model, backward)`` is on one batch."""
        self.restart(model)
        for _ in range(self.settings.steps):
            forget_loss(self.model, torch.autograd.backward)
            with torch.no_grad():
                moved = [(p.data, p.grad) for p in self.parameters if p.grad is not None]
                values, gradients = map(list, zip(*moved, strict=True))
                torch._foreach_add_(values, gradients, alpha=-self.settings.lr)
            for parameter in self.parameters:
                parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)


def _values(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]

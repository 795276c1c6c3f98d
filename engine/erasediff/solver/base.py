"""What every method's step shares: addressed randomness, one update from one or two gradients, resumable state."""

from __future__ import annotations

from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from erasediff.gradients import Gradients, LocalGradients
from erasediff.objectives import Denoiser, DenoisingObjective, diffusers_denoiser
from erasediff.process import Process, noise_key
from erasediff.solver.barrier import Barrier
from erasediff_kernels import Constraint, constraint_multiplier


class SolverOptions(TypedDict, total=False):
    """Keywords that every method takes.

    denoiser:           how the model is called; the default suits diffusers' UNets
    min_snr_gamma:      min-SNR weighting of the losses; None (default) for none
    antithetic:         antithetic pairs of timesteps; default False
    max_grad_norm:      clips the update's direction to this norm; None for no clipping; default 1.0
    accumulation_steps: micro-batches per step; default 1
    autocast:           torch.bfloat16 for mixed precision; None (default) for none
    seed:               of noise, timesteps and targets; default 0
    gradients:          where gradients live; ``LocalGradients`` by default
    """

    denoiser: Denoiser
    min_snr_gamma: float | None
    antithetic: bool
    max_grad_norm: float | None
    accumulation_steps: int
    autocast: torch.dtype | None
    seed: int
    gradients: Gradients | None


class Solver:
    """Base of the methods; a subclass adds ``name`` and ``step``."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, process: Process, **options: Unpack[SolverOptions]
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.device = next(model.parameters()).device
        self.seed = options.pop("seed", 0)
        self.max_grad_norm = options.pop("max_grad_norm", 1.0)
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, or None for no clipping, got {self.max_grad_norm}")
        self.gradients = options.pop("gradients", None) or LocalGradients(optimizer)
        self.objective = DenoisingObjective(
            process=process.to(self.device),
            denoiser=options.pop("denoiser", diffusers_denoiser),
            min_snr_gamma=options.pop("min_snr_gamma", None),
            antithetic=options.pop("antithetic", False),
            accumulation_steps=options.pop("accumulation_steps", 1),
            autocast=options.pop("autocast", None),
        )
        if options:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(options))}")
        self.iteration = 0
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)

    def _key(self) -> Tensor:
        return noise_key(self.seed, self.iteration, self.device)

    def _update(
        self, retain: list[Tensor], forget: list[Tensor], barrier: Barrier, gap: Tensor | None = None
    ) -> Constraint:
        """The Gram values give multiplier, norm and finiteness; then one pass over memory updates the weights."""
        gram = self.gradients.gram(retain, forget)
        constraint = constraint_multiplier(gram, barrier.name, barrier.eta, gap=gap, max_norm=self.max_grad_norm)
        self.gradients.update(retain, forget, constraint)
        self.iteration += 1
        self.skipped = self.skipped + (~constraint.finite).to(torch.int64)
        return constraint

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs besides the model's weights."""
        return {"iteration": self.iteration, "skipped": self.skipped, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores ``state_dict``; the model's weights are loaded by whoever saved them."""
        self.iteration = int(state["iteration"])
        self.skipped = state["skipped"].to(self.device)
        self.optimizer.load_state_dict(state["optimizer"])

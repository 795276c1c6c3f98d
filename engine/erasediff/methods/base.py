"""What every method's step shares: addressed randomness, one update from one or two gradients, resumable state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor, nn

from erasediff.diffusion.batch import Batch, Denoiser, diffusers_denoiser
from erasediff.diffusion.losses import Backward, DenoisingObjective
from erasediff.diffusion.noise_schedule import Process
from erasediff.diffusion.rng import noise_key
from erasediff.methods.barriers import Barrier, Gap
from erasediff.parallel.factory import gradients_for
from erasediff.parallel.full_weights import averaged_weights, full_weights
from erasediff.parallel.gradient_store import GradientStore, Shard
from erasediff_kernels import constraint_multiplier

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


class StepReport(NamedTuple):
    """0-D tensors on the model's device; reading one synchronises, carrying it does not.

    A field is None where the method has no such quantity.
    """

    retain_loss: Tensor | None = None
    forget_loss: Tensor | None = None
    gap: Tensor | None = None
    multiplier: Tensor | None = None
    grad_norm: Tensor | None = None
    """|delta| before clipping."""
    finite: Tensor | None = None
    skipped: Tensor | None = None
    """Steps skipped so far, int64."""

    def scalars(self) -> dict[str, Tensor]:
        """The fields that this step has."""
        return {name: value for name, value in self._asdict().items() if value is not None}


T = TypeVar("T", int, float, float | None)


class SolverOptions(TypedDict, total=False):
    """Keywords that every method takes.

    denoiser:           how the model is called; the default suits diffusers' UNets
    min_snr_gamma:      min-SNR weighting of the losses; None (default) for none
    antithetic:         antithetic pairs of timesteps; default False
    max_grad_norm:      clips the update's direction to this norm; None for no clipping; default 1.0, or what a
                        DeepSpeed engine was configured with
    accumulation_steps: micro-batches per step, into which each process cuts its batch; default 1, or likewise
    autocast:           torch.bfloat16 for mixed precision; None (default) for none
    seed:               of noise, timesteps and targets; default 0
    gradients:          where gradients live; ``gradients_for`` the model and the optimizer by default
    """

    denoiser: Denoiser
    min_snr_gamma: float | None
    antithetic: bool
    max_grad_norm: float | None
    accumulation_steps: int
    autocast: torch.dtype | None
    seed: int
    gradients: GradientStore | None


class Solver:
    """Base of the methods; a subclass adds ``name`` and ``step``."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        process: Process | SchedulerMixin,
        **options: Unpack[SolverOptions],
    ) -> None:
        self.model = model
        if not isinstance(process, Process):
            process = Process.from_scheduler(process)
        self.gradients = options.pop("gradients", None) or gradients_for(model, optimizer)
        self.optimizer = self.gradients.optimizer
        self.device = self.gradients.device
        self.seed = options.pop("seed", 0)
        self.max_grad_norm: float | None = _option_or_engine_value(
            "max_grad_norm", options, self.gradients.max_grad_norm, 1.0
        )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, or None for no clipping, got {self.max_grad_norm}")
        self.objective = DenoisingObjective(
            process=process.to(self.device),
            denoiser=options.pop("denoiser", diffusers_denoiser),
            min_snr_gamma=options.pop("min_snr_gamma", None),
            antithetic=options.pop("antithetic", False),
            accumulation_steps=_option_or_engine_value(
                "accumulation_steps", options, self.gradients.accumulation_steps, 1
            ),
            autocast=options.pop("autocast", None),
            rank=self.gradients.world.rank,
        )
        if options:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(options))}")
        self.iteration = 0
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)

    def _key(self) -> Tensor:
        return noise_key(self.seed, self.iteration, self.device)

    def _gradient(self, batch: Batch, loss: Callable[[Backward], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """``loss`` of this process's ``batch``, and its gradient."""
        self.gradients.begin(self.objective.micro_batch_count(batch))
        value = loss(self.gradients.backward)
        return value, self.gradients.pop_grads()

    def _update(
        self, retain: list[Tensor], forget: list[Tensor], barrier: Barrier, **losses: Tensor | None
    ) -> StepReport:
        """The Gram values give multiplier, norm and finiteness; then one pass over memory updates the weights.

        losses: ``retain_loss``, ``forget_loss`` and ``inner_loss`` of this process's batch, or None
        """
        known = {name: loss for name, loss in losses.items() if loss is not None}
        gram, *means = self._reduced(self.gradients.gram(retain, forget), list(known.values()))
        mean: dict[str, Tensor] = dict(zip(known, means, strict=True))
        gap = mean["forget_loss"] - mean.pop("inner_loss") if "inner_loss" in mean else None
        used = gap if barrier.name == Gap.name else None
        constraint = constraint_multiplier(gram, barrier.name, barrier.eta, gap=used, max_norm=self.max_grad_norm)
        self.gradients.update(retain, forget, constraint)
        self.iteration += 1
        self.skipped = self.skipped + (~constraint.finite).to(torch.int64)
        return StepReport(
            **mean,
            gap=gap,
            multiplier=constraint.multiplier if forget else None,
            grad_norm=constraint.norm,
            finite=constraint.finite,
            skipped=self.skipped,
        )

    def _reduced(self, gram: Tensor, losses: list[Tensor]) -> tuple[Tensor, ...]:
        """The Gram values and losses of the global batch: one all-reduce of these few numbers, none for one process."""
        world, gram = self.gradients.world, gram.to(self.device)
        if world.size == 1:
            return gram, *losses
        shares = torch.cat([gram / self.gradients.replicas, torch.stack(losses).double() / world.size])
        total = world.sum(shares)
        return total[:3], *total[3:].float().unbind()

    def full_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """The model's ``state_dict`` entry by entry, on the first process: see ``erasediff.gradients.full_weights``."""
        return full_weights(self.model)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """The model holds its averaged weights within the block: see ``erasediff.gradients.averaged_weights``."""
        return averaged_weights(self.gradients)

    def shards(self) -> Iterator[Shard]:
        """What this process holds of the weights and of all that belongs to them: see ``GradientStore.shards``."""
        return self.gradients.shards()

    def own_shards(self) -> Iterator[Shard]:
        """What belongs to samples rather than weights: this process's part, in every layout."""
        return iter(())

    def scalars(self) -> dict[str, Tensor]:
        """With the shards, all that a resumed run needs, whatever its number of processes; the same on each."""
        iteration = torch.tensor(self.iteration)
        return {"iteration": iteration, "skipped": self.skipped, **self.gradients.scalars()}

    def load_scalars(self, scalars: Mapping[str, Tensor]) -> None:
        """Restores ``scalars``, after the ``shards`` were written to."""
        self.iteration = int(scalars["iteration"])
        self.skipped = scalars["skipped"].to(self.device)
        self.gradients.load_scalars(scalars)
        self.gradients.refresh()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs besides the model's weights."""
        return {"iteration": self.iteration, "skipped": self.skipped, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores ``state_dict``; the model's weights are loaded by whoever saved them."""
        self.iteration = int(state["iteration"])
        self.skipped = state["skipped"].to(self.device)
        self.optimizer.load_state_dict(state["optimizer"])


def _option_or_engine_value(name: str, options: SolverOptions, engines: T | None, default: T) -> T:
    """The option of this name, which must not contradict the engine's own configuration."""
    if engines is None:
        return options.pop(name, default)  # type: ignore[misc, no-any-return]
    given = options.pop(name, engines)  # type: ignore[misc]
    if given != engines:
        raise ValueError(f"{name} is {given}, but the engine was configured with {engines}: give it once")
    return engines

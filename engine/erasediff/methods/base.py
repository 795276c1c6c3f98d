"""The base of all methods: gradients over micro-batches, one update from one or two of them, resumable state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor, nn

from erasediff.diffusion.batch import Batch, Denoiser, diffusers_denoiser, micro_batches
from erasediff.diffusion.losses import DenoisingObjective, MicroBatchLoss
from erasediff.diffusion.noise_schedule import Process
from erasediff.diffusion.rng import noise_key
from erasediff.methods.barriers import Barrier, Fixed, StepValues
from erasediff.parallel.factory import gradients_for
from erasediff.parallel.full_weights import averaged_weights, full_weights
from erasediff.parallel.gradient_store import GradientStore, Shard
from erasediff_kernels import Constraint

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

    Attributes:
        denoiser: the call of the model; the default suits diffusers' UNets.
        min_snr_gamma: gamma of min-SNR weights of the losses; None (default) for none.
        antithetic: antithetic pairs of timesteps; default False.
        max_grad_norm: clips the update's direction to this norm; None for no clipping; default 1.0, or what a DeepSpeed
            engine was configured with.
        accumulation_steps: micro-batches per step, into which each process cuts its batch; default 1, or likewise.
        autocast: torch.bfloat16 for mixed precision; None (default) for none.
        seed: of noise, timesteps and targets; default 0.
        gradients: where gradients live; ``gradients_for`` the model and the optimizer by default.
    """

    denoiser: Denoiser
    min_snr_gamma: float | None
    antithetic: bool
    max_grad_norm: float | None
    accumulation_steps: int
    autocast: torch.dtype | None
    seed: int
    gradients: GradientStore | None


class Solver(ABC):
    """The base of the methods: one step at a time, on the device, resumable.

    A subclass has a ``name`` and a ``step``, which is linear: ``loss_and_gradient`` of one or two losses, then
    ``_update``, or what that consists of (``_values``, ``Barrier.constraint``, ``GradientStore.update``,
    ``_finish_step``).

    Args:
        model: predicts from (x_t, timesteps, **condition); what ``optimizer`` holds are its weights.
        optimizer: None for that of a DeepSpeed engine.
        process: noise schedule and prediction type: a diffusers scheduler, or a ``Process``.
        **options: see ``SolverOptions``.

    Raises:
        ValueError: for settings out of range.
        TypeError: for an option that does not exist.
    """

    name: ClassVar[str]
    barrier: Barrier = Fixed(0.0)
    """The rule that combines the gradients; a method of two sets its own."""

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
        self.accumulation_steps: int = _option_or_engine_value(
            "accumulation_steps", options, self.gradients.accumulation_steps, 1
        )
        if self.accumulation_steps < 1:
            raise ValueError(f"accumulation_steps must be at least 1, got {self.accumulation_steps}")
        self.autocast = options.pop("autocast", None)
        self.objective = DenoisingObjective(
            process=process.to(self.device),
            denoiser=options.pop("denoiser", diffusers_denoiser),
            min_snr_gamma=options.pop("min_snr_gamma", None),
            antithetic=options.pop("antithetic", False),
            autocast=partial(self.gradients.autocast, self.autocast),
        )
        if options:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(options))}")
        self.iteration = 0
        """Steps taken so far."""
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)

    @property
    def updates(self) -> int:
        """Steps so far that were to change weights, ``skipped`` ones included."""
        return self.iteration

    @abstractmethod
    def step(self, retain: Batch, forget: Batch) -> StepReport:
        """Take one step.

        Among several processes each gives its own part, all of one size, and every report tells of the whole. Nothing
        is read on the host: the report's values are 0-D tensors on the device. A step whose gradients are not finite
        leaves weights and optimizer state untouched and adds one to ``skipped``.

        Args:
            retain: retained data; see ``Batch``.
            forget: data to forget.
        """

    def _key(self) -> Tensor:
        return noise_key(self.seed, self.iteration, self.device)

    def _micro_batches(self, batch: Batch) -> list[tuple[dict[str, Tensor], Tensor]]:
        return micro_batches(batch, self.accumulation_steps, self.gradients.world.rank)

    def loss_and_gradient(self, batch: Batch, loss: MicroBatchLoss) -> tuple[Tensor, list[Tensor]]:
        """Evaluate a loss and its gradient, micro-batch by micro-batch.

        Args:
            batch: this process's part of the global batch.
            loss: from (micro-batch, weight [b]) to a 0-D loss; those of ``objective`` with the model bound.

        Returns:
            (loss, gradient): the mean over this process's batch, 0-D float32, detached; and this process's share of the
            gradient, averaged over processes, as ``GradientStore.pop_grads`` returns it.
        """
        parts = self._micro_batches(batch)
        self.gradients.begin(len(parts))
        total = torch.zeros((), device=self.device)
        for part, weight in parts:
            value = loss(part, weight)
            self.gradients.backward(value)
            total = total + value.detach()
        return total, self.gradients.pop_grads()

    @torch.no_grad()
    def _loss(self, batch: Batch, loss: MicroBatchLoss) -> Tensor:
        """The mean ``loss`` of this process's ``batch``, without a gradient."""
        total = torch.zeros((), device=self.device)
        for part, weight in self._micro_batches(batch):
            total = total + loss(part, weight)
        return total

    def _update(
        self,
        retain: list[Tensor],
        forget: list[Tensor],
        *,
        retain_loss: Tensor | None = None,
        forget_loss: Tensor | None = None,
    ) -> StepReport:
        """One step along the barrier's combination of both gradients; ``forget`` is empty for a method of one."""
        has_multiplier = bool(forget)
        values = self._values(retain, forget, retain_loss=retain_loss, forget_loss=forget_loss)
        constraint = self.barrier.constraint(values, self.max_grad_norm)
        self.gradients.update(retain, forget, constraint)
        return self._finish_step(values, constraint, has_multiplier=has_multiplier)

    def _values(
        self,
        retain: list[Tensor],
        forget: list[Tensor],
        *,
        retain_loss: Tensor | None = None,
        forget_loss: Tensor | None = None,
        inner_loss: Tensor | None = None,
    ) -> StepValues:
        """Gram values and losses of the global batch: one all-reduce of these few numbers, none for one process.

        Args:
            retain: r, this process's share.
            forget: g likewise, or empty.
            retain_loss: of this process's batch, as the following.
            forget_loss: L_f(theta).
            inner_loss: L_f(phi_K).
        """
        gram = self.gradients.gram(retain, forget).to(self.device)
        named = {"retain_loss": retain_loss, "forget_loss": forget_loss, "inner_loss": inner_loss}
        losses = {name: loss for name, loss in named.items() if loss is not None}
        world = self.gradients.world
        if world.size > 1:
            shares = torch.cat([gram / self.gradients.replicas, torch.stack([*losses.values()]).double() / world.size])
            total = world.sum(shares)
            gram, losses = total[:3], dict(zip(losses, total[3:].float().unbind(), strict=True))
        inner = losses.pop("inner_loss", None)
        return StepValues(gram, **losses, gap=None if inner is None else losses["forget_loss"] - inner)

    def _finish_step(self, values: StepValues, constraint: Constraint, *, has_multiplier: bool = True) -> StepReport:
        """Count the step that was taken, and report it."""
        self.barrier.advance(values, constraint.finite)
        self.iteration += 1
        self.skipped = self.skipped + (~constraint.finite).to(torch.int64)
        return StepReport(
            retain_loss=values.retain_loss,
            forget_loss=values.forget_loss,
            gap=values.gap,
            multiplier=_multiplier_of(constraint) if has_multiplier else None,
            grad_norm=constraint.norm,
            finite=constraint.finite,
            skipped=self.skipped,
        )

    def full_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """The model's ``state_dict`` entry by entry, on the first process: see ``parallel.full_weights``."""
        return full_weights(self.model)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """The model holds its averaged weights within the block: see ``parallel.full_weights``."""
        return averaged_weights(self.gradients)

    def shards(self) -> Iterator[Shard]:
        """This process's weights and all that belongs to them: see ``GradientStore.shards``."""
        return self.gradients.shards()

    def own_shards(self) -> Iterator[Shard]:
        """This process's state that belongs to samples rather than weights, in every layout."""
        return iter(())

    def scalars(self) -> dict[str, Tensor]:
        """With the shards, all that a resumed run needs, whatever its number of processes; the same on each."""
        iteration = torch.tensor(self.iteration)
        barrier = {f"barrier.{name}": value for name, value in self.barrier.scalars().items()}
        return {"iteration": iteration, "skipped": self.skipped, **barrier, **self.gradients.scalars()}

    def load_scalars(self, scalars: Mapping[str, Tensor]) -> None:
        """Restore ``scalars``, after the ``shards`` were written to."""
        self.iteration = int(scalars["iteration"])
        self.skipped = scalars["skipped"].to(self.device)
        self.barrier.load_scalars({name: scalars[f"barrier.{name}"] for name in self.barrier.scalars()})
        self.gradients.load_scalars(scalars)
        self.gradients.refresh()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs besides the model's weights."""
        state = {"iteration": self.iteration, "skipped": self.skipped, "optimizer": self.optimizer.state_dict()}
        barrier = self.barrier.scalars()
        return {**state, "barrier": barrier} if barrier else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict``; the model's weights are loaded by whoever saved them."""
        self.iteration = int(state["iteration"])
        self.skipped = state["skipped"].to(self.device)
        if barrier := self.barrier.scalars():
            self.barrier.load_scalars({name: state["barrier"][name] for name in barrier})
        self.optimizer.load_state_dict(state["optimizer"])


def _multiplier_of(constraint: Constraint) -> Tensor:
    """lambda of r + lambda g, or b / a of a r + b g; 0 for no step."""
    if constraint.multiplier.dim() == 0:
        return constraint.multiplier
    retain, forget = constraint.multiplier.unbind()
    return forget / torch.where(retain == 0, 1.0, retain)


def _option_or_engine_value(name: str, options: SolverOptions, engine_value: T | None, default: T) -> T:
    """The option of this name, which must not contradict the engine's own configuration."""
    if engine_value is None:
        return options.pop(name, default)  # type: ignore[misc, no-any-return]
    option = options.pop(name, engine_value)  # type: ignore[misc]
    if option != engine_value:
        raise ValueError(f"{name} is {option}, but the engine was configured with {engine_value}: give it once")
    return engine_value

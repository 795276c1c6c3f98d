"""EraseDiff: constrained first-order unlearning with a multiplier in closed form (arXiv 2401.05779)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from erasediff.config import Config, UnlearnConfig
from erasediff.diffusion.batch import Batch
from erasediff.diffusion.losses import MicroBatchLoss
from erasediff.diffusion.noise_schedule import Process
from erasediff.diffusion.targets import DeviationTarget, GaussianNoise, Relabel, UniformNoise, check_frozen
from erasediff.errors import UserError
from erasediff.methods.barriers import BARRIERS, Barrier, Norm
from erasediff.methods.base import Solver, SolverOptions, StepReport
from erasediff.methods.inner_solve import InnerCopy, InnerSolve
from erasediff.methods.spec import (
    FORGET_KEYS,
    RETAIN_KEYS,
    SOLVER_KEYS,
    UNTIL_KEYS,
    BuildContext,
    MethodSpec,
    Requirements,
)
from erasediff.parallel.gradient_store import Shard

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


class EraseDiff(Solver):
    """The constrained first-order method of EraseDiff (arXiv 2401.05779, Theorem 3.1), one step at a time.

    You keep the loop, the model and the optimizer; ``step`` computes both gradients, the multiplier and the update.

    Args:
        model: predicts from (x_t, timesteps, **condition); its weights are what ``optimizer`` holds. A plain module,
            one in DDP, one after ``fully_shard``, a DeepSpeed engine (ZeRO 0-3), or what ``accelerate`` made of them.
        optimizer: ``ConstrainedAdamW`` or ``ConstrainedSGD`` for the fused update, or any ``torch.optim.Optimizer``; an
            engine brings its own.
        process: noise schedule and prediction type: diffusers' scheduler of the pipeline, or a ``Process``.
        barrier: combines the gradients; ``Norm`` by default. One instance belongs to one solver: it may have state.
        target: ``UniformNoise`` (default), ``GaussianNoise`` or ``Relabel``.
        inner: settings of the inner solve; it runs only under a barrier that depends on it.
        retain_teacher: the frozen model whose predictions on the retained batch are preserved, instead of its true
            noise; costs its forward pass, and keeps what the model can do better. None (default): L_r of the paper.
        **options: see ``SolverOptions``.

    Raises:
        ValueError: for settings out of range, and for a teacher that is not frozen.
        TypeError: for an option that does not exist.
    """

    name: ClassVar[str] = "erasediff"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        process: Process | SchedulerMixin,
        barrier: Barrier | None = None,
        target: DeviationTarget | None = None,
        inner: InnerSolve | None = None,
        retain_teacher: nn.Module | None = None,
        **options: Unpack[SolverOptions],
    ) -> None:
        super().__init__(model, optimizer, process=process, **options)
        self.barrier = Norm() if barrier is None else barrier
        self.target: DeviationTarget = UniformNoise() if target is None else target
        self.retain_teacher = None if retain_teacher is None else check_frozen(retain_teacher)
        self.inner: InnerCopy | None = None
        if self.barrier.needs_inner_solve:
            self.inner = InnerCopy(self.gradients, inner or InnerSolve())

    def step(self, retain: Batch, forget: Batch) -> StepReport:
        """One step: delta = r + lambda g, lambda = max(0, (a - <r,g>) / |g|^2) (Theorem 3.1); see ``Solver.step``."""
        key = self._key()
        inner_loss = self._inner_loss(forget, key)  # L_f(phi_K), for a barrier that asks for it
        with self.gradients.no_reshard():
            retain_loss, r = self.loss_and_gradient(retain, self._retain_loss(key))
            forget_loss, g = self.loss_and_gradient(forget, self._forget_loss(key))
        # |r|^2, <r,g>, |g|^2 and the mean losses: all that processes exchange
        values = self._values(r, g, retain_loss=retain_loss, forget_loss=forget_loss, inner_loss=inner_loss)
        constraint = self.barrier.constraint(values, self.max_grad_norm)  # lambda, |delta|, clipping
        self.gradients.update(r, g, constraint)  # theta - lr delta, or what the optimizer makes of delta
        return self._finish_step(values, constraint)

    def _retain_loss(self, key: Tensor) -> MicroBatchLoss:
        """L_r: the denoising loss, or the distance to the teacher's predictions."""
        if self.retain_teacher is None:
            return partial(self.objective.retain_loss, self.model, key=key)
        return partial(self.objective.preservation_loss, self.model, self.retain_teacher, key=key)

    def _forget_loss(self, key: Tensor) -> MicroBatchLoss:
        """L_f: the distance to the deviated target."""
        return partial(self.objective.forget_loss, self.model, self.target, key=key)

    def _inner_loss(self, forget: Batch, key: Tensor) -> Tensor | None:
        """L_f(phi_K) on the batch, timesteps and noise that this step's L_f(theta) uses; None without inner solve."""
        if self.inner is None:
            return None
        loss = self._forget_loss(key)
        with self.inner.in_place_of_the_weights():
            if self.iteration % self.inner.settings.refresh_every == 0:
                self.inner.minimise(lambda: self.loss_and_gradient(forget, loss)[1])
            return self._loss(forget, loss)

    def shards(self) -> Iterator[Shard]:
        return self.gradients.shards(**({} if self.inner is None else {"inner": self.inner.weights}))

    def state_dict(self) -> dict[str, Any]:
        inner = None if self.inner is None else self.inner.weights
        return {**super().state_dict(), "inner": inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.inner is not None:
            self.inner.load(state["inner"])


def barrier_of(settings: UnlearnConfig) -> Barrier:
    """The barrier by its name, with those of the settings ``eta`` and ``level`` that it takes.

    Raises:
        UserError: for a setting that it does not take, or one that it cannot do without.
    """
    barrier = BARRIERS[settings.barrier]
    parameters = inspect.signature(barrier).parameters
    options: dict[str, float] = {}
    for setting, number in (("eta", settings.eta), ("level", settings.level)):
        # The fixed barrier's one number is the multiplier itself.
        name = "multiplier" if setting == "eta" and "multiplier" in parameters else setting
        if number is None:
            if name in parameters and parameters[name].default is inspect.Parameter.empty:
                raise UserError(f"The barrier {settings.barrier} needs a {setting}: set unlearn.{setting}.")
        elif name not in parameters:
            raise UserError(f"The barrier {settings.barrier} takes no {setting}: omit unlearn.{setting}.")
        else:
            options[name] = number
    return barrier(**options)


def target_of(settings: UnlearnConfig, relabel: Callable[[], Relabel]) -> DeviationTarget:
    """The target by its name. UserError for a space of predictions with a target that is one."""
    space = settings.target_space or "noise"
    match settings.target:
        case "uniform":
            return UniformNoise(space)
        case "gaussian":
            return GaussianNoise(space)
        case _ if space != "noise":
            raise UserError("unlearn.target_space is for the targets uniform and gaussian: omit it.")
        case _:
            return relabel()


def erasediff_options(context: BuildContext) -> dict[str, Any]:
    """Keywords of ``EraseDiff`` alone."""
    settings = context.config.unlearn
    return {
        "barrier": barrier_of(settings),
        "target": target_of(settings, context.relabel),
        "retain_teacher": context.teacher() if settings.retain_target == "teacher" else None,
        "inner": InnerSolve(
            steps=settings.inner_steps, lr=settings.inner_lr, refresh_every=settings.inner_refresh_every
        ),
    }


def build(context: BuildContext) -> EraseDiff:
    return EraseDiff(
        context.network,
        context.optimizer,
        process=context.process,
        **erasediff_options(context),
        **context.options,
    )


def needs(config: Config) -> Requirements:
    """Requirements of ``erasediff_options``."""
    settings = config.unlearn
    relabel = settings.target == "relabel"
    teacher = settings.retain_target == "teacher" or (relabel and settings.teacher == "frozen")
    return Requirements(teacher=teacher, relabel=relabel)


READS = (
    SOLVER_KEYS
    | UNTIL_KEYS
    | RETAIN_KEYS
    | FORGET_KEYS
    | {"target", "relabel_to", "target_space", "teacher", "retain_target", "barrier", "eta", "level"}
    | {"inner_steps", "inner_lr", "inner_refresh_every"}
)

SPEC = MethodSpec(
    name="erasediff",
    summary="constrained bi-level unlearning (arXiv 2401.05779)",
    reads=lambda _: READS,
    needs=needs,
    build=build,
)

"""EraseDiff as a configuration describes it; the method itself is ``erasediff.solver.EraseDiff``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from erasediff.config import Config, UnlearnConfig
from erasediff.diffusion.batch import Batch
from erasediff.diffusion.losses import Backward
from erasediff.diffusion.noise_schedule import Process
from erasediff.diffusion.targets import DeviationTarget, GaussianNoise, Relabel, UniformNoise
from erasediff.methods.barriers import Barrier, Cosine, Fixed, Gap, Norm
from erasediff.methods.base import Solver, SolverOptions, StepReport
from erasediff.methods.inner_solve import InnerCopy, InnerSolve
from erasediff.methods.spec import FORGET_KEYS, RETAIN_KEYS, SOLVER_KEYS, BuildContext, MethodSpec, Requirements
from erasediff.parallel.gradient_store import Shard

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


class EraseDiff(Solver):
    """The constrained first-order method of EraseDiff (arXiv 2401.05779, Theorem 3.1), one step at a time.

    You keep the loop, the model and the optimizer; ``step`` computes both gradients, the multiplier and the update.

    model:     predicts from (x_t, timesteps, **condition); its weights are what ``optimizer`` holds. A plain module,
               one in DDP, one after ``fully_shard``, a DeepSpeed engine (ZeRO 0-3), or what ``accelerate`` made of them
    optimizer: ``ConstrainedAdamW`` or ``ConstrainedSGD`` for the fused update, or any ``torch.optim.Optimizer``; an
               engine brings its own
    process:   noise schedule and prediction type: diffusers' scheduler of the pipeline, or a ``Process``
    barrier:   ``Norm`` (default), ``Gap``, ``Fixed`` or ``Cosine``
    target:    ``UniformNoise`` (default), ``GaussianNoise`` or ``Relabel``
    inner:     settings of the inner solve; it runs only under a barrier that depends on it
    retain_teacher: the frozen model whose predictions on the retained batch are preserved, instead of its true noise;
               costs its forward pass, and keeps what the model can do better. None (default): L_r of the paper
    options:   see ``SolverOptions``

    Raises ``ValueError`` for settings out of range, ``TypeError`` for an option that does not exist.
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
        self.barrier: Barrier = Norm() if barrier is None else barrier
        self.target: DeviationTarget = UniformNoise() if target is None else target
        self.retain_teacher = None if retain_teacher is None else retain_teacher.requires_grad_(False).eval()
        self.inner: InnerCopy | None = None
        if self.barrier.needs_inner_solve:
            self.inner = InnerCopy(self.gradients, inner or InnerSolve())

    def step(self, retain: Batch, forget: Batch) -> StepReport:
        """One constrained update from a retained and a forgotten batch (see ``erasediff.objectives.Batch``).

        Among several processes each gives its own part, all of one size, and every report tells of the whole. Nothing
        is read on the host: the report's values are 0-D tensors on the device. A step whose gradients are not
        finite leaves weights and optimizer state untouched and adds one to ``skipped``.
        """
        key = self._key()
        inner_loss = None if self.inner is None else self._inner_loss(self.inner, forget, key)
        with self.gradients.no_reshard():
            retain_loss, retain_gradient = self._gradient(
                retain, lambda backward: self._retain_loss(retain, key, backward)
            )
            forget_loss, forget_gradient = self._gradient(
                forget, lambda backward: self.objective.forget_loss(self.model, forget, key, self.target, backward)
            )
        return self._update(
            retain_gradient,
            forget_gradient,
            self.barrier,
            retain_loss=retain_loss,
            forget_loss=forget_loss,
            inner_loss=inner_loss,
        )

    def _retain_loss(self, retain: Batch, key: Tensor, backward: Backward | None) -> Tensor:
        if self.retain_teacher is None:
            return self.objective.retain_loss(self.model, retain, key, backward)
        return self.objective.preservation_loss(self.model, self.retain_teacher, retain, key, backward)

    def _inner_loss(self, inner: InnerCopy, forget: Batch, key: Tensor) -> Tensor:
        """L_f(phi_K) on the batch, timesteps and noise that this step's L_f(theta) uses."""

        def loss(backward: Backward | None) -> Tensor:
            return self.objective.forget_loss(self.model, forget, key, self.target, backward)

        with inner.in_place_of_the_weights():
            if self.iteration % inner.settings.refresh_every == 0:
                inner.minimise(lambda: self._gradient(forget, loss)[1])
            with torch.no_grad():
                return loss(None)

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
    """The barrier by its name, with ``eta`` as its number."""
    assert settings.eta is not None
    barriers: dict[str, Callable[[float], Barrier]] = {"norm": Norm, "gap": Gap, "fixed": Fixed, "cosine": Cosine}
    return barriers[settings.barrier](settings.eta)


def target_of(settings: UnlearnConfig, relabel: Callable[[], Relabel]) -> DeviationTarget:
    """The target by its name."""
    match settings.target:
        case "uniform":
            return UniformNoise()
        case "gaussian":
            return GaussianNoise()
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
    | RETAIN_KEYS
    | FORGET_KEYS
    | {"target", "relabel_to", "teacher", "retain_target", "barrier", "eta"}
    | {"inner_steps", "inner_lr", "inner_refresh_every"}
)

SPEC = MethodSpec(
    name="erasediff",
    summary="constrained bi-level unlearning (arXiv 2401.05779)",
    reads=lambda _: READS,
    needs=needs,
    build=build,
)

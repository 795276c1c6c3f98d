"""Erased Stable Diffusion: a concept is erased from its prompt alone, without images (arXiv 2303.07345)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor, nn

from erasediff.config import Config
from erasediff.config.fields import Count, NonNegative, Section
from erasediff.diffusion.batch import Batch
from erasediff.diffusion.noise_schedule import Process
from erasediff.diffusion.targets import NegativeGuidance, check_frozen
from erasediff.diffusion.trajectories import Trajectories
from erasediff.errors import UserError
from erasediff.methods.barriers import Barrier, Fixed
from erasediff.methods.base import Solver, SolverOptions, StepReport
from erasediff.methods.spec import SOLVER_KEYS, UNTIL_KEYS, BuildContext, MethodSpec, Requirements
from erasediff.parallel.gradient_store import Shard


class ESD(Solver):
    """Descent on | eps_theta(x_t, c, t) - [e_0 - eta (e_c - e_0)] |^2, e the frozen model (2303.07345, eq. 7).

    No image is needed: x_t is on a sampling trajectory for c, guided by ``guidance_scale``. Where the frozen model
    samples (as in the authors' newer code), its two predictions at x_t serve the target and the trajectory's next step
    alike; where the current one does (as in the paper), it predicts once more. The paper draws a fresh trajectory and a
    jittered timestep for every sample; here see ``Trajectories``.

    The paper's ESD-x, ESD-x-strict and ESD-u are selections of weights: "xattn", "xattn-kv", "noxattn".

    Args:
        model: as in ``Solver``.
        optimizer: likewise.
        process: likewise.
        teacher: the frozen model; None for a subclass that has it otherwise (``frozen``).
        concepts: condition tensors [N, ...]; trajectory i is of concept i mod N.
        null: likewise [1, ...], of the empty prompt.
        erase_from: likewise, of what the concept is erased from; None: see ``NegativeGuidance``.
        shape: (C, h, w) of a sample.
        batch_size: of this process.
        guidance: of the target; ``NegativeGuidance()`` by default.
        guidance_scale: classifier-free guidance of the trajectories.
        num_inference_steps: steps of a whole trajectory.
        latents_from: the model that samples the trajectories, the frozen or the current one.
        references: condition tensors [M, ...] of what is to stay (ours): every other trajectory is then of one of
            these, the frozen model's prediction there is preserved, and ``barrier`` balances the two as in
            ``EraseDiff``. None (default): as published.
        barrier: with references; default: both losses alike.
        attack: condition tensors [K, ...] that are to bring the concept back; for diagnosis alone.
        **options: see ``SolverOptions``.

    Raises:
        ValueError: for a teacher that is not frozen, and with references where a process's batch is odd.
    """

    name: ClassVar[str] = "esd"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        process: Process,
        teacher: nn.Module | None = None,
        concepts: Mapping[str, Tensor],
        null: Mapping[str, Tensor],
        erase_from: Mapping[str, Tensor] | None = None,
        shape: tuple[int, ...],
        batch_size: int,
        guidance: NegativeGuidance | None = None,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 50,
        latents_from: Literal["frozen", "current"] = "frozen",
        references: Mapping[str, Tensor] | None = None,
        barrier: Barrier | None = None,
        attack: Mapping[str, Tensor] | None = None,
        **options: Unpack[SolverOptions],
    ) -> None:
        if references is not None and batch_size % 2:
            raise ValueError(f"half of the trajectories are of references: batch_size must be even, got {batch_size}")
        if teacher is None and type(self).frozen is ESD.frozen:
            raise ValueError("ESD needs a teacher: pass copy.deepcopy(model).requires_grad_(False).eval()")
        super().__init__(model, optimizer, process=process, **options)
        self.teacher = None if teacher is None else check_frozen(teacher)
        self.concepts, self.null, self.erase_from = dict(concepts), dict(null), erase_from
        self.guidance = guidance or NegativeGuidance()
        self.guidance_scale = guidance_scale
        self.latents_from = latents_from
        self.references = None if references is None else dict(references)
        if self.references is not None:
            self.barrier = Fixed(1.0) if barrier is None else barrier
        self.attack = None if attack is None else dict(attack)
        world = self.gradients.world
        self.trajectories = Trajectories(
            self.objective.process,
            shape,
            torch.arange(batch_size, device=self.device) + world.rank * batch_size,
            total=batch_size * world.size,
            steps=num_inference_steps,
            seed=self.seed,
        )

    def step(self, retain: Batch | None = None, forget: Batch | None = None) -> StepReport:
        """One step on latents of its own; both batches are ignored. See ``Solver.step``."""
        sample = self.states()
        predictions = self._predicted(sample, self.iteration, frozen=True)
        batch = {
            "sample": sample,
            "sample_ids": self.trajectories.slots,
            "target": self.guidance.target(*predictions),
            "timesteps": self.trajectories.times(self.iteration),
            **self.condition(self.iteration),
        }
        advanced = self._advanced(sample, predictions)
        loss = partial(self.objective.loss_to_target, self.model)
        if self.references is None:
            forget_loss, gradient = self.loss_and_gradient(batch, loss)
            report = self._update(gradient, [], forget_loss=forget_loss)
        else:
            retain = {name: value[1::2] for name, value in (batch | {"target": predictions[0]}).items()}
            retain_loss, r = self.loss_and_gradient(retain, loss)
            forget_loss, g = self.loss_and_gradient({name: value[::2] for name, value in batch.items()}, loss)
            report = self._update(r, g, retain_loss=retain_loss, forget_loss=forget_loss)
        # Last: a step that fails before the update can be taken again.
        self.trajectories.sample, self.trajectories.iteration = advanced, self.iteration
        return report

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **self.trajectories.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.trajectories.load_state_dict(state, self.iteration)

    def own_shards(self) -> Iterator[Shard]:
        """The states of this process's trajectories, of the pool of all."""
        pool = self.trajectories
        pool.sample = pool.sample.contiguous()
        first = int(pool.slots[0]) * pool.sample[0].numel()
        yield Shard("trajectories", first, {"trajectories": pool.sample.view(-1)})

    def load_scalars(self, scalars: Mapping[str, Tensor]) -> None:
        super().load_scalars(scalars)
        # A run that was saved before its first step had no pool.
        self.trajectories.iteration = self.iteration or None

    def states(self) -> Tensor:
        """x_t of every trajectory now, [B, C, h, w]; a pool that is not there yet is sampled from its noise."""
        pool = self.trajectories
        if pool.iteration != self.iteration:
            # As far back as the oldest trajectory began, on a clock that may be negative; those that begin later wait.
            pool.sample = pool.noise(self.iteration)
            for back in range(pool.steps - 1, 0, -1):
                self._catch_up(back)
            pool.iteration = self.iteration
        return pool.sample

    def _catch_up(self, back: int) -> None:
        """Advance those trajectories that were on their way ``back`` iterations ago by the step they took then."""
        pool = self.trajectories
        _, step = pool.places(self.iteration)
        is_under_way = step >= back
        then = (step - back).clamp(min=0)
        frozen, times = self.latents_from == "frozen", pool.timesteps[then]
        predictions = self._predicted(pool.sample, self.iteration, frozen=frozen, timesteps=times)
        moved = pool.moved(pool.sample, self._guided(*predictions[:2]), then)
        pool.sample = torch.where(is_under_way.view(-1, *(1,) * (moved.ndim - 1)), moved, pool.sample)

    def _advanced(self, sample: Tensor, frozen_predictions: tuple[Tensor, ...]) -> Tensor:
        """The states at the next iteration."""
        frozen = self.latents_from == "frozen"
        predictions = frozen_predictions if frozen else self._predicted(sample, self.iteration, frozen=False)
        return self.trajectories.advanced(sample, self._guided(*predictions[:2]), self.iteration)

    def _guided(self, concept: Tensor, null: Tensor) -> Tensor:
        return torch.lerp(null, concept, self.guidance_scale)

    def condition(self, iteration: int, concepts: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Each trajectory's own condition; with ``concepts`` [N, ...], one of these in the place of a concept."""
        number, _ = self.trajectories.places(iteration)
        rows = concepts or self.concepts
        if self.references is None:
            return {name: value[number % value.shape[0]] for name, value in rows.items()}
        turn = number // 2
        of_concept = self.of_concept()
        condition = {}
        for name, value in rows.items():
            reference = self.references[name]
            where = of_concept.view(-1, *(1,) * (value.ndim - 1))
            condition[name] = torch.where(where, value[turn % value.shape[0]], reference[turn % reference.shape[0]])
        return condition

    def of_concept(self) -> Tensor:
        """Bool [B]: which trajectories are of a concept, rather than of a reference; the same at every iteration."""
        slots = self.trajectories.slots
        return torch.ones_like(slots, dtype=torch.bool) if self.references is None else slots % 2 == 0

    def frozen_pair(self, sample: Tensor, iteration: int) -> tuple[Tensor, Tensor]:
        """The frozen model's predictions (e_c, e_0) of the states ``sample`` at ``iteration``."""
        concept, null, *_ = self._predicted(sample, iteration, frozen=True)
        return concept, null

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        """The model as it was before the first step."""
        assert self.teacher is not None
        yield self.teacher

    @torch.no_grad()
    def _predicted(
        self, sample: Tensor, iteration: int, *, frozen: bool, timesteps: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """(e_c, e_0) and, of the frozen model, the prediction with the prompt to erase from: one pass for all."""
        conditions = [self.condition(iteration), self._repeated(self.null)]
        if frozen and self.erase_from is not None:
            conditions.append(self._repeated(self.erase_from))
        count = len(conditions)
        condition = {name: torch.cat([part[name] for part in conditions]) for name in conditions[0]}
        times = self.trajectories.times(iteration) if timesteps is None else timesteps
        with self.frozen() if frozen else nullcontext(self.model) as model:
            prediction = self.objective.prediction(
                model, sample.repeat(count, *(1,) * (sample.ndim - 1)), times.repeat(count), condition
            )
        return prediction.float().chunk(count)

    def _repeated(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        size = self.trajectories.slots.numel()
        return {name: value.expand(size, *value.shape[1:]) for name, value in condition.items()}


class EsdConfig(Section):
    """Settings of Erased Stable Diffusion.

    Attributes:
        eta: strength of negative guidance.
        convention: of eta and of the target's base: "paper", e_0 - eta (e_c - e_0), or "repository", the authors' newer
            code, e_c - eta (e_c - e_0): its eta = 2 is the paper's 1.
        erase_from: a prompt whose prediction is the base in either convention.
        start_guidance: guidance scale of the trajectories that x_t is taken from.
        num_inference_steps: steps of a whole trajectory.
        latents_from: whose trajectories: "frozen", as in the newer code, or "current", as in the paper.
    """

    eta: NonNegative = 1.0
    convention: Literal["paper", "repository"] = "paper"
    erase_from: str | None = None
    start_guidance: NonNegative = 3.0
    num_inference_steps: Count = 50
    latents_from: Literal["frozen", "current"] = "frozen"


def encoded_prompts(config: Config) -> list[list[str]]:
    """The lists of prompts that ``esd_options`` encodes."""
    erase_from = config.section(EsdConfig).erase_from
    return [*([] if erase_from is None else [[erase_from]]), list(config.images.forget_prompts), [""]]


def esd_options(context: BuildContext) -> dict[str, Any]:
    """Keywords of ``ESD`` alone. UserError without a prompt to erase."""
    settings = context.config.section(EsdConfig)
    if not context.prompts:
        raise UserError("ESD erases a concept by its prompts, and there are none; give --forget-prompts.")
    erase_from = None if settings.erase_from is None else floats(context.encode_prompts([settings.erase_from]))
    return {
        "concepts": floats(context.encode_prompts(context.prompts)),
        "null": floats(context.encode_prompts([""])),
        "erase_from": erase_from,
        "shape": context.latent_shape(),
        "batch_size": context.batch_size,
        "guidance": NegativeGuidance(eta=settings.eta, convention=settings.convention),
        "guidance_scale": settings.start_guidance,
        "num_inference_steps": settings.num_inference_steps,
        "latents_from": settings.latents_from,
    }


def build(context: BuildContext) -> ESD:
    return ESD(
        context.network,
        context.optimizer,
        process=context.process,
        teacher=context.teacher(),
        **esd_options(context),
        **context.options,
    )


def floats(condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in condition.items()}


SPEC = MethodSpec(
    name="esd",
    summary="negative guidance away from a prompt (Erased Stable Diffusion, arXiv 2303.07345)",
    config=EsdConfig,
    reads=lambda _: SOLVER_KEYS | UNTIL_KEYS,
    needs=lambda _: Requirements(retain=False, forget=False, teacher=True),
    prompts=encoded_prompts,
    build=build,
)

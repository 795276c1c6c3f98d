"""Erased Stable Diffusion: what a prompt means is taken away, from the prompt alone (arXiv 2303.07345)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor, nn

from erasediff.errors import UserError
from erasediff.methods.protocol import Materials, Needs, Recipe
from erasediff.objectives import Batch, NegativeGuidance, Trajectories
from erasediff.process import Process
from erasediff.solver import Fixed, Solver, SolverOptions, StepReport


class ESD(Solver):
    """Descent on | eps_theta(x_t, c, t) - [e_0 - eta (e_c - e_0)] |^2, e the frozen model (2303.07345, eq. 7).

    No image is needed: x_t is on a sampling trajectory for c, guided by ``guidance_scale``. Where the frozen model
    samples (as in the authors' newer code), its two predictions at x_t serve the target and the trajectory's next step
    alike; where the current one does (as in the paper), it predicts once more. The paper draws a fresh trajectory and a
    jittered timestep for every sample; here see ``Trajectories``.

    The paper's ESD-x, ESD-x-strict and ESD-u are selections of weights: "xattn", "xattn-kv", "noxattn".

    teacher:    the frozen model
    concepts:   condition tensors [N, ...]; trajectory i is of concept i mod N
    null:       likewise [1, ...], of the empty prompt
    erase_from: likewise, of what the concept is erased from; None: see ``NegativeGuidance``
    shape:      (C, h, w) of a sample
    batch_size: of this process
    """

    name: ClassVar[str] = "esd"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        process: Process,
        teacher: nn.Module,
        concepts: Mapping[str, Tensor],
        null: Mapping[str, Tensor],
        erase_from: Mapping[str, Tensor] | None = None,
        shape: tuple[int, ...],
        batch_size: int,
        guidance: NegativeGuidance | None = None,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 50,
        latents_from: Literal["frozen", "current"] = "frozen",
        **options: Unpack[SolverOptions],
    ) -> None:
        super().__init__(model, optimizer, process=process, **options)
        self.teacher = teacher.requires_grad_(False).eval()
        self.concepts, self.null, self.erase_from = dict(concepts), dict(null), erase_from
        self.guidance = guidance or NegativeGuidance()
        self.guidance_scale = guidance_scale
        self.latents_from = latents_from
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
        """One step on latents of its own; both batches are ignored. See ``EraseDiff.step`` for what is returned."""
        sample = self._sample()
        predictions = self._predicted(self.teacher, sample, self.iteration)
        batch = {
            "sample": sample,
            "sample_ids": self.trajectories.slots,
            "target": self.guidance.target(*predictions),
            "timesteps": self.trajectories.times(self.iteration),
            **self._condition(self.iteration),
        }
        self._advance(sample, predictions)
        loss, gradient = self._gradient(batch, lambda backward: self.objective.given_loss(self.model, batch, backward))
        return self._update(gradient, [], Fixed(0.0), forget_loss=loss)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "trajectories": self.trajectories.sample}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.trajectories.sample, self.trajectories.iteration = state["trajectories"], self.iteration

    def _sample(self) -> Tensor:
        """x_t of every trajectory now.

        A pool that is not there, at the beginning or on another number of processes, is sampled anew from its noise:
        the frozen model arrives at the same one, the current model at that of its weights now.
        """
        pool = self.trajectories
        if pool.sample is None or pool.iteration != self.iteration:
            # As far back as the oldest trajectory began, on a clock that may be negative; those that begin later wait.
            pool.sample = pool.noise(self.iteration)
            for back in range(pool.steps - 1, 0, -1):
                self._catch_up(back)
            pool.iteration = self.iteration
        return pool.sample

    def _catch_up(self, back: int) -> None:
        """Advance those trajectories that were on their way ``back`` iterations ago by the step they took then."""
        pool = self.trajectories
        assert pool.sample is not None
        _, step = pool.places(self.iteration)
        on_their_way = step >= back
        then = (step - back).clamp(min=0)
        predictions = self._predicted(self._sampler, pool.sample, self.iteration, timesteps=pool.timesteps[then])
        moved = pool.moved(pool.sample, self._guided(*predictions[:2]), then)
        pool.sample = torch.where(on_their_way.view(-1, *(1,) * (moved.ndim - 1)), moved, pool.sample)

    @property
    def _sampler(self) -> nn.Module:
        return self.teacher if self.latents_from == "frozen" else self.model

    def _advance(self, sample: Tensor, of_teacher: tuple[Tensor, ...]) -> None:
        pool = self.trajectories
        frozen = self.latents_from == "frozen"
        predictions = of_teacher if frozen else self._predicted(self.model, sample, self.iteration)
        pool.sample = pool.advanced(sample, self._guided(*predictions[:2]), self.iteration)
        pool.iteration = self.iteration + 1

    def _guided(self, concept: Tensor, null: Tensor) -> Tensor:
        return torch.lerp(null, concept, self.guidance_scale)

    def _condition(self, iteration: int) -> dict[str, Tensor]:
        number, _ = self.trajectories.places(iteration)
        return {name: value[number % value.shape[0]] for name, value in self.concepts.items()}

    @torch.no_grad()
    def _predicted(
        self, model: nn.Module, sample: Tensor, iteration: int, timesteps: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """(e_c, e_0) and, for the teacher, the prediction with the prompt to erase from: one pass for all."""
        conditions = [self._condition(iteration), self._repeated(self.null)]
        if self.erase_from is not None and model is self.teacher:
            conditions.append(self._repeated(self.erase_from))
        count = len(conditions)
        condition = {name: torch.cat([part[name] for part in conditions]) for name in conditions[0]}
        times = self.trajectories.times(iteration) if timesteps is None else timesteps
        prediction = self.objective.prediction(
            model, sample.repeat(count, *(1,) * (sample.ndim - 1)), times.repeat(count), condition
        )
        return prediction.float().chunk(count)

    def _repeated(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        size = self.trajectories.slots.numel()
        return {name: value.expand(size, *value.shape[1:]) for name, value in condition.items()}


def own_options(materials: Materials) -> dict[str, Any]:
    """The options that only ESD takes. UserError for no prompt to erase."""
    settings = materials.config.esd
    if not materials.prompts:
        raise UserError("ESD erases what prompts mean: say which with --forget-prompts.")
    erase_from = None if settings.erase_from is None else _floats(materials.encode_prompts([settings.erase_from]))
    return {
        "concepts": _floats(materials.encode_prompts(materials.prompts)),
        "null": _floats(materials.encode_prompts([""])),
        "erase_from": erase_from,
        "shape": materials.latent_shape(),
        "batch_size": materials.batch_size,
        "guidance": NegativeGuidance(eta=settings.eta, convention=settings.convention),
        "guidance_scale": settings.start_guidance,
        "num_inference_steps": settings.num_inference_steps,
        "latents_from": settings.latents_from,
        "teacher": materials.teacher(),
    }


def make(materials: Materials) -> ESD:
    return ESD(
        materials.network,
        materials.optimizer,
        process=materials.process,
        **own_options(materials),
        **materials.options,
    )


def _floats(condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in condition.items()}


RECIPE = Recipe(name=ESD.name, make=make, needs=lambda _: Needs(retain=False, forget=False))

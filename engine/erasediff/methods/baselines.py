"""Baselines: fine-tuning and retraining on retained data, gradient ascent on forgotten data."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch

from erasediff.config import Config, TrainConfig
from erasediff.diffusion.batch import Batch
from erasediff.diffusion.rng import NoiseRole
from erasediff.errors import UserError
from erasediff.methods.base import Solver, StepReport
from erasediff.methods.spec import (
    FORGET_KEYS,
    RETAIN_KEYS,
    SOLVER_KEYS,
    BuildContext,
    MethodSpec,
    Requirements,
)
from erasediff.models.diffusion_model import Space
from erasediff.parallel.unwrap import unwrapped

CONTROL_KEYS = SOLVER_KEYS | RETAIN_KEYS | FORGET_KEYS
"""Both kinds of batches are made for a control, though it looks at one: it shares the settings of what it controls."""


class FineTune(Solver):
    """Descent on the denoising loss of the retained batch; the forgotten one is not looked at.

    Forgets only as far as the weights drift: the control that tells what the constraint adds.
    """

    name: ClassVar[str] = "finetune"

    def step(self, retain: Batch, forget: Batch | None = None) -> StepReport:
        """One step on ``retain``; see ``Solver.step``."""
        loss, gradient = self.loss_and_gradient(
            retain, partial(self.objective.retain_loss, self.model, key=self._key())
        )
        return self._update(gradient, [], retain_loss=loss)


def build_finetune(context: BuildContext) -> FineTune:
    return FineTune(context.network, context.optimizer, process=context.process, **context.options)


FINETUNE = MethodSpec(
    name="finetune",
    summary="fine-tuning on retained data (a control)",
    reads=lambda _: CONTROL_KEYS,
    needs=lambda _: Requirements(forget=False),
    build=build_finetune,
)


class NegativeGradient(Solver):
    """Ascent on the true denoising loss of the forgotten batch (NegGrad, Golatkar et al. 2020); a control.

    Nothing bounds the loss from above, so the rest of the model is destroyed as well; EraseDiff's deviated target and
    its retain gradient exist to avoid that.
    """

    name: ClassVar[str] = "neggrad"

    def step(self, retain: Batch, forget: Batch) -> StepReport:
        """One step on ``forget``; see ``Solver.step``."""
        loss = partial(
            self.objective.denoising_loss,
            self.model,
            key=self._key(),
            noise=NoiseRole.FORGET_NOISE,
            timestep=NoiseRole.FORGET_TIMESTEP,
        )
        negative_loss, gradient = self.loss_and_gradient(forget, lambda part, weight: loss(part, -weight))
        return self._update(gradient, [], forget_loss=-negative_loss)


def build_neggrad(context: BuildContext) -> NegativeGradient:
    return NegativeGradient(context.network, context.optimizer, process=context.process, **context.options)


NEGGRAD = MethodSpec(
    name="neggrad",
    summary="gradient ascent on forgotten data (a control)",
    reads=lambda _: CONTROL_KEYS,
    needs=lambda _: Requirements(retain=False),
    build=build_neggrad,
)


class Retrain(FineTune):
    """Training on the retained data of a network whose weights were drawn anew.

    It never saw the forgotten data, so it is what exact unlearning would end with. It costs a whole training: for
    models that train here.
    """

    name: ClassVar[str] = "retrain"

    @torch.no_grad()
    def draw_weights(self) -> None:
        """A diffusers network's initial weights, the same for the same ``seed``; the global random state is left alone.

        Each process draws all of them and keeps its shard. UserError for a network of which only a part is trained:
        the rest would stay as it was.
        """
        network: Any = unwrapped(self.model)
        if not all(parameter.requires_grad for parameter in network.parameters()):
            raise UserError("Retraining begins with new weights everywhere: train all of them, with --train full.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            fresh = dict(type(network).from_config(network.config).named_parameters())
        for name, start, tensors in self.gradients.shards():
            for key in tensors.keys() & {"weight", "ema"}:
                tensor = tensors[key]
                tensor.copy_(fresh[name].flatten()[start : start + tensor.numel()].view_as(tensor))
        self.gradients.refresh()


def build_retrain(context: BuildContext) -> Retrain:
    method = Retrain(context.network, context.optimizer, process=context.process, **context.options)
    method.draw_weights()
    return method


def retrain_defaults(_config: Config, space: Space) -> dict[str, Any]:
    """As long as the base model was trained, where the base models are trained here."""
    return {"steps": TrainConfig().steps, "lr": TrainConfig().lr} if space == "pixel" else {}


RETRAIN = MethodSpec(
    name="retrain",
    summary="training anew on retained data (exact unlearning)",
    reads=lambda _: CONTROL_KEYS,
    defaults=retrain_defaults,
    needs=lambda _: Requirements(forget=False),
    build=build_retrain,
)

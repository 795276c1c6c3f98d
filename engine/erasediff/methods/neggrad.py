"""Negative gradient: ascend on the forgotten data's denoising loss."""

from __future__ import annotations

from typing import ClassVar

from erasediff.methods.protocol import Materials, Needs, Recipe
from erasediff.objectives import Batch
from erasediff.process import NoiseRole
from erasediff.solver import Fixed, Solver, StepReport


class NegativeGradient(Solver):
    """Ascent on the true denoising loss of the forgotten batch (NegGrad, Golatkar et al. 2020); a control.

    Nothing bounds the loss from above, so the rest of the model is destroyed as well; EraseDiff's deviated target and
    its retain gradient exist to avoid that.
    """

    name: ClassVar[str] = "neggrad"

    def step(self, retain: Batch, forget: Batch) -> StepReport:
        """One step on ``forget``; see ``EraseDiff.step`` for what is returned and when a step is skipped."""
        loss, gradient = self._gradient(
            forget,
            lambda backward: self.objective.true_loss(
                self.model,
                forget,
                self._key(),
                backward,
                noise=NoiseRole.FORGET_NOISE,
                timestep=NoiseRole.FORGET_TIMESTEP,
                sign=-1.0,
            ),
        )
        return self._update(gradient, [], Fixed(0.0), forget_loss=loss)


def make(materials: Materials) -> NegativeGradient:
    return NegativeGradient(materials.network, materials.optimizer, process=materials.process, **materials.options)


RECIPE = Recipe(name=NegativeGradient.name, make=make, needs=lambda _: Needs(retain=False))

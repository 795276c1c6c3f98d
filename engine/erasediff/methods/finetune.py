"""Plain training on retained data: the base model's trainer, the retrained oracle, and a control."""

from __future__ import annotations

from typing import ClassVar

from erasediff.methods.protocol import Materials, Needs, Recipe
from erasediff.objectives import Batch
from erasediff.solver import Fixed, Solver, StepReport


class FineTune(Solver):
    """Descent on the denoising loss of the retained batch; the forgotten one is not looked at.

    Forgets only as far as the weights drift: the control that tells what the constraint adds.
    """

    name: ClassVar[str] = "finetune"

    def step(self, retain: Batch, forget: Batch | None = None) -> StepReport:
        """One step on ``retain``; see ``EraseDiff.step`` for what is returned and when a step is skipped."""
        loss, gradient = self._gradient(
            retain, lambda backward: self.objective.retain_loss(self.model, retain, self._key(), backward)
        )
        return self._update(gradient, [], Fixed(0.0), retain_loss=loss)


def make(materials: Materials) -> FineTune:
    return FineTune(materials.network, materials.optimizer, process=materials.process, **materials.options)


RECIPE = Recipe(name=FineTune.name, make=make, needs=lambda _: Needs(forget=False))

"""SalUn: relabelling that moves only the weights which matter to the forgotten data (arXiv 2310.12508)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from erasediff.errors import UserError
from erasediff.methods.protocol import Materials, Needs, Recipe
from erasediff.models.saliency import forget_gradients, set_saliency_mask
from erasediff.objectives import Batch
from erasediff.solver import EraseDiff, Fixed, Solver


class SalUn(EraseDiff):
    """Descent on alpha L_r + E | eps(x_t | c') - eps(x_t | c) |^2 under a saliency mask (2310.12508, eq. 5 and 7).

    It is EraseDiff's step with a ``Relabel`` target and a constant multiplier 1 / alpha: the same direction, of another
    length, which Adam does not notice. The mask is the optimizer's (``models.saliency``): weights without their bit
    have no part in the step.
    """

    name = "salun"


def make(materials: Materials) -> SalUn:
    config, settings = materials.config, materials.config.salun
    if config.unlearn.target not in (None, "relabel"):
        raise UserError(f"SalUn's target is relabel, not {config.unlearn.target}: leave --target away.")
    if config.text_to_image.saliency is not None or config.text_to_image.train == "lora":
        raise UserError(
            "SalUn chooses among the model's own weights: set salun.share, not text_to_image.saliency, and no LoRA."
        )
    method = SalUn(
        materials.network,
        materials.optimizer,
        process=materials.process,
        barrier=Fixed(1 / settings.retain_weight),
        target=materials.relabel(),
        **materials.options,
    )
    keep_to_the_salient(method, materials.forget_batches(settings.batches), share=settings.share)
    return method


def keep_to_the_salient(method: Solver, batches: Iterable[Batch], *, share: float) -> None:
    """Let ``method`` move only the ``share`` of weights that matter most to ``batches`` of forgotten data."""
    objective = dataclasses.replace(method.objective, min_snr_gamma=None, antithetic=False)
    values = forget_gradients(method.model, method.gradients, objective, batches, seed=method.seed)
    set_saliency_mask(method.gradients, values, share=share)


RECIPE = Recipe(
    name=SalUn.name,
    make=make,
    needs=lambda config: Needs(teacher=config.unlearn.teacher == "frozen", relabel=True),
)

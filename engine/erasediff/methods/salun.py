"""SalUn: relabelling that moves only the weights which matter to the forgotten data (arXiv 2310.12508)."""

from __future__ import annotations

from erasediff.errors import UserError
from erasediff.methods.protocol import Materials, Recipe
from erasediff.models.saliency import forget_gradients, set_saliency_mask
from erasediff.objectives import DenoisingObjective
from erasediff.solver import EraseDiff, Fixed


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
    parameters = [parameter for parameter in materials.network.parameters() if parameter.requires_grad]
    objective = DenoisingObjective(
        process=method.objective.process, denoiser=materials.denoiser, autocast=method.objective.autocast
    )
    batches = materials.forget_batches(settings.batches)
    gradients = forget_gradients(materials.network, parameters, objective, batches, seed=config.seed)
    set_saliency_mask(materials.optimizer, parameters, gradients, share=settings.share)
    return method


RECIPE = Recipe(name=SalUn.name, make=make)

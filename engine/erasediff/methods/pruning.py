"""Pruning for concept erasing: which weights to leave out is learned, none is changed (arXiv 2405.16534, P-ESD)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from erasediff.config import Config
from erasediff.errors import UserError
from erasediff.methods import erasediff, esd
from erasediff.methods.esd import ESD
from erasediff.methods.neurons import concept_neurons
from erasediff.methods.protocol import Materials, Method, Needs, Recipe
from erasediff.models.masks import add_masks, merge_masks, save_masks, weight_masks, without_masks
from erasediff.runs.atomic import atomic_write
from erasediff.solver import Barrier, EraseDiff, Solver, StepReport

MASK, NEURONS = "mask.safetensors", "neurons.json"


class SparsityPenalty(Solver):
    """Adds the gradient of ``sparsity_weight`` mean(1 - sigmoid(s)) to that of the scores s.

    Taken from the scores themselves, wherever their shards are, so it needs no backward pass.
    """

    sparsity_weight: float
    score_count: int

    def _update(
        self, retain: list[Tensor], forget: list[Tensor], barrier: Barrier, **losses: Tensor | None
    ) -> StepReport:
        scale = -self.sparsity_weight / self.score_count
        for gradient, score in zip(retain, self.gradients.weights(), strict=True):
            sigmoid = torch.sigmoid(score.detach().to(gradient.dtype))
            gradient.add_(sigmoid * (1 - sigmoid), alpha=scale)
        return super()._update(retain, forget, barrier, **losses)


class PrunedESD(SparsityPenalty, ESD):
    """min over M of L_ESD(theta o M), M in {0, 1} per weight, theta frozen (2405.16534, P-ESD).

    The paper publishes neither relaxation nor schedule. Ours: M = 1[sigmoid(s) > 1/2] with a straight-through gradient,
    every score s at ``initial_score`` first, and a penalty on the pruned share. A pruned weight can come back. The
    frozen model is the same network without its masks: no second copy.
    """

    name: ClassVar[str] = "pruning"

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        with without_masks(self.model):
            yield self.model


class PrunedEraseDiff(SparsityPenalty, EraseDiff):
    """As ``PrunedESD``, with EraseDiff's two losses and its multiplier (ours)."""

    name: ClassVar[str] = "pruning"


def trained(config: Config, network: nn.Module, selected: Any) -> list[nn.Parameter]:
    """The scores of the masks over the selected weights."""
    return add_masks(network, selected, config.pruning.initial_score)


def make(materials: Materials) -> PrunedESD | PrunedEraseDiff:
    settings = materials.config.pruning
    given: dict[str, Any] = {"process": materials.process, **materials.options}
    method: PrunedESD | PrunedEraseDiff
    if settings.objective == "esd":
        options = esd.own_options(materials)
        method = PrunedESD(materials.network, materials.optimizer, **options, **given)
        if settings.attack_prompts:
            method.attack = esd.floats(materials.encode_prompts(settings.attack_prompts))
    else:
        options = erasediff.own_options(materials)
        method = PrunedEraseDiff(materials.network, materials.optimizer, **options, **given)
    method.sparsity_weight = settings.sparsity_weight
    method.score_count = sum(mask.score.numel() for _, _, mask in weight_masks(materials.network))
    return method


def finish(method: Method, path: Path) -> None:
    """Make the masks part of the model, and write them and the neurons that they are about beside it."""
    assert isinstance(method, PrunedESD | PrunedEraseDiff)
    if all(bool((mask.score > 0).all()) for _, _, mask in weight_masks(method.model)):
        raise UserError(
            "No weight was pruned: raise pruning.sparsity_weight, the learning rate or the number of steps."
        )
    if isinstance(method, PrunedESD):
        atomic_write(path.with_name(NEURONS), json.dumps(concept_neurons(method), indent=1) + "\n")
    save_masks(merge_masks(method.model), path.with_name(MASK))


def needs(config: Config) -> Needs:
    looks = config.pruning.objective == "erasediff"
    return Needs(retain=looks, forget=looks)


RECIPE = Recipe(name="pruning", make=make, needs=needs, trained=trained, finish=finish)

"""Pruning for concept erasing: which weights to leave out is learned, none is changed (arXiv 2405.16534, P-ESD)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from erasediff.config import Config
from erasediff.errors import UserError
from erasediff.io.atomic import atomic_write
from erasediff.methods import erasediff, esd
from erasediff.methods.activation_stats import (
    InputNorms,
    Observations,
    concept_neurons,
    of_batches,
    on_trajectories,
    over_inputs,
)
from erasediff.methods.barriers import Barrier
from erasediff.methods.base import Solver, StepReport
from erasediff.methods.concept_prune import HeldMask
from erasediff.methods.erasediff import EraseDiff
from erasediff.methods.esd import ESD
from erasediff.methods.spec import BuildContext, Method, MethodSpec, Requirements
from erasediff.models.weight_masks import (
    add_masks,
    limit_masks,
    load_masks,
    masked_weights,
    merge_masks,
    save_masks,
    weight_masks,
    without_masks,
)

MASK, NEURONS = "mask.safetensors", "neurons.json"
NEURON_OBSERVATIONS = 8


class SparsityPenalty(Solver):
    """Adds the gradient of ``sparsity_weight`` mean(1 - sigmoid(s)) to that of the scores s.

    Taken from the scores themselves, wherever their shards are, so it needs no backward pass.
    """

    sparsity_weight: float
    score_count: int
    observations: Observations

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
    every score s at ``initial_score`` first, and a penalty on the pruned share. A pruned weight can come back. Only
    weights that the concept drives may go (``correlated``), and what the network predicts for other prompts is
    preserved (``references`` of ``ESD``): without either, all weights come near the threshold together, and the network
    is lost at once. The frozen model is the same network without its masks: no second copy.
    """

    name: ClassVar[str] = "pruning"

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        with without_masks(self.model):
            yield self.model


class PrunedEraseDiff(SparsityPenalty, EraseDiff):
    """As ``PrunedESD``, with EraseDiff's two losses and its multiplier (ours)."""

    name: ClassVar[str] = "pruning"


@torch.no_grad()
def correlated(method: Solver, observations: Observations, count: int) -> dict[str, Tensor]:
    """|w| (|x| under the concept - |x| elsewhere) of each masked weight, by the masked module's name.

    |x| is the root mean square of the weight's input. The paper finds a concept's neurons by their activations before
    and after erasing; here the comparison is between prompts, so that it can be made before.
    """
    layers = {name: module for name, module, _ in weight_masks(method.model)}
    seen = InputNorms.none(layers, 1, method.device)
    for observation in observations(count):
        seen.observe(method, layers, observation)
    found = {}
    for name, _, _ in weight_masks(method.model):
        elsewhere, concept = seen.norms(name)[:, 0]
        weight: Any = layers[name].weight
        found[name] = weight.abs() * over_inputs(weight, concept - elsewhere)
    return found


def trained(config: Config, network: nn.Module, selected: Any) -> list[nn.Parameter]:
    """The scores of the masks over the selected weights or, where no mask is learned, those weights."""
    scores = add_masks(network, selected, config.pruning.initial_score)
    if config.pruning.learned:
        return scores
    for score in scores:
        score.requires_grad_(False)
    weights = list(masked_weights(network))
    for weight in weights:
        weight.requires_grad_(True)
    return weights


def make(materials: BuildContext) -> PrunedESD | PrunedEraseDiff | HeldMask:
    settings = materials.config.pruning
    given: dict[str, Any] = {"process": materials.process, **materials.options}
    method: ESD | EraseDiff
    observations: Observations
    if settings.objective == "esd":
        method = _of_prompts(materials, given)
        observations = partial(on_trajectories, method)
    else:
        kind = PrunedEraseDiff if settings.learned else EraseDiff
        method = kind(materials.network, materials.optimizer, **erasediff.own_options(materials), **given)
        observations = partial(of_batches, method, materials.retain_batches, materials.forget_batches)
    if isinstance(method, PrunedESD | PrunedEraseDiff):
        method.observations = observations
        method.sparsity_weight = settings.sparsity_weight
        limit_masks(method.model, correlated(method, observations, settings.observations), settings.share)
        method.score_count = sum(mask.score.numel() for _, _, mask in weight_masks(materials.network))
        return method
    for _, _, mask in weight_masks(materials.teacher()):
        mask.active = False
    return HeldMask(
        method,
        observations,
        masks=None if settings.mask is None else load_masks(settings.mask),
        count=settings.observations,
        share=settings.share,
        bins=settings.timestep_bins,
    )


def _of_prompts(materials: BuildContext, given: dict[str, Any]) -> ESD:
    config, settings = materials.config, materials.config.pruning
    if materials.batch_size % 2:
        raise UserError("Half of what pruning looks at is to stay: give an even unlearn.batch_size.")
    others = config.images.retain_prompts or (() if config.esd.erase_from is None else (config.esd.erase_from,))
    options = esd.own_options(materials) | {
        "references": esd.floats(materials.encode_prompts([*others, ""])),
        "barrier": erasediff.barrier_of(config.unlearn),
    }
    if settings.learned:
        method: ESD = PrunedESD(materials.network, materials.optimizer, **options, **given)
    else:
        method = ESD(materials.network, materials.optimizer, teacher=materials.teacher(), **options, **given)
    if settings.attack_prompts:
        method.attack = esd.floats(materials.encode_prompts(settings.attack_prompts))
    return method


def finish(method: Method, path: Path) -> None:
    """Make the masks part of the model, and write them and the neurons that they are about beside it."""
    assert isinstance(method, PrunedESD | PrunedEraseDiff | HeldMask)
    solver = method.tuned if isinstance(method, HeldMask) else method
    if all(bool((mask.score > 0).all()) for _, _, mask in weight_masks(solver.model)):
        raise UserError(
            "No weight was pruned: raise pruning.share, the learning rate or the number of steps, or lower "
            "pruning.sparsity_weight."
        )
    neurons = concept_neurons(solver, method.observations(NEURON_OBSERVATIONS))
    atomic_write(path.with_name(NEURONS), json.dumps(neurons, indent=1) + "\n")
    save_masks(merge_masks(solver.model), path.with_name(MASK))


def needs(config: Config) -> Requirements:
    if config.pruning.objective == "erasediff":
        return Requirements(relabel=erasediff.needs(config).relabel)
    return Requirements(retain=False, forget=False)


SPEC = MethodSpec(name="pruning", make=make, needs=needs, trained=trained, finish=finish)

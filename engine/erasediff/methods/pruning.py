"""Pruning for concept erasing: which weights to leave out is learned, none is changed (arXiv 2405.16534, P-ESD)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from erasediff.config import Config
from erasediff.config.fields import Count, NonNegative, Positive, Section, Share
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
from erasediff.methods.spec import SOLVER_KEYS, BuildContext, Method, MethodSpec, Requirements, Space
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


class PruningConfig(Section):
    """Settings of pruning. No default of the learned mask is the paper's: it publishes none.

    Attributes:
        variant: a mask that is learned, or one computed from activations (ConceptPrune, ``HeldMask``).
        objective: whose loss the mask is learned with, or the surviving weights tuned with.
        share: learned: of each layer's weights, how many may be pruned, those that the concept drives most;
            training-free: of each neuron's, how many are pruned per bin of timesteps at most.
        observations: batches that activations are measured on.
        initial_score: of every weight that may be pruned; a weight is pruned when its score falls below 0.
        sparsity_weight: of the penalty on the pruned share.
        lr: learning rate of the scores, where unlearn.lr is not set.
        timestep_bins: training-free: ranges of timesteps with scores of their own.
        finetune_steps: training-free: steps for the surviving weights, after the observations.
        mask: of an earlier pruning: it is held, and the surviving weights are tuned in all steps.
        attack_prompts: prompts that are to bring the concept back, for the report on neurons.
    """

    variant: Literal["learned", "training-free"] = "learned"
    objective: Literal["esd", "erasediff"] = "esd"
    share: Share = 0.1
    observations: Count = 16
    initial_score: Positive = 1.0
    sparsity_weight: NonNegative = 0.0
    lr: Positive = 0.1
    timestep_bins: Count = 10
    finetune_steps: Annotated[int, Field(ge=0)] = 0
    mask: Path | None = None
    attack_prompts: tuple[str, ...] = ()

    @property
    def learned(self) -> bool:
        """Whether the masks' scores are what is trained."""
        return self.variant == "learned" and self.mask is None


def trained(config: Config, network: nn.Module, selected: Any) -> list[nn.Parameter]:
    """The scores of the masks over the selected weights or, where no mask is learned, those weights."""
    settings = config.section(PruningConfig)
    scores = add_masks(network, selected, settings.initial_score)
    if settings.learned:
        return scores
    for score in scores:
        score.requires_grad_(False)
    weights = list(masked_weights(network))
    for weight in weights:
        weight.requires_grad_(True)
    return weights


def build(context: BuildContext) -> PrunedESD | PrunedEraseDiff | HeldMask:
    settings = context.config.section(PruningConfig)
    given: dict[str, Any] = {"process": context.process, **context.options}
    method: ESD | EraseDiff
    observations: Observations
    if settings.objective == "esd":
        method = _of_prompts(context, given)
        observations = partial(on_trajectories, method)
    else:
        kind = PrunedEraseDiff if settings.learned else EraseDiff
        method = kind(context.network, context.optimizer, **erasediff.erasediff_options(context), **given)
        observations = partial(of_batches, method, context.retain_batches, context.forget_batches)
    if isinstance(method, PrunedESD | PrunedEraseDiff):
        method.observations = observations
        method.sparsity_weight = settings.sparsity_weight
        limit_masks(method.model, correlated(method, observations, settings.observations), settings.share)
        method.score_count = sum(mask.score.numel() for _, _, mask in weight_masks(context.network))
        return method
    for _, _, mask in weight_masks(context.teacher()):
        mask.active = False
    return HeldMask(
        method,
        observations,
        masks=None if settings.mask is None else load_masks(settings.mask),
        count=settings.observations,
        share=settings.share,
        bins=settings.timestep_bins,
    )


def _of_prompts(context: BuildContext, given: dict[str, Any]) -> ESD:
    config = context.config
    settings = config.section(PruningConfig)
    erase_from = config.section(esd.EsdConfig).erase_from
    if context.batch_size % 2:
        raise UserError("Half of a batch of pruning is of prompts to retain; give an even unlearn.batch_size.")
    others = config.images.retain_prompts or (() if erase_from is None else (erase_from,))
    options = esd.esd_options(context) | {
        "references": esd.floats(context.encode_prompts([*others, ""])),
        "barrier": erasediff.barrier_of(config.unlearn),
    }
    if settings.learned:
        method: ESD = PrunedESD(context.network, context.optimizer, **options, **given)
    else:
        method = ESD(context.network, context.optimizer, teacher=context.teacher(), **options, **given)
    if settings.attack_prompts:
        method.attack = esd.floats(context.encode_prompts(settings.attack_prompts))
    return method


def finalize(method: Method, path: Path) -> None:
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


def prunes_by_prompts(config: Config) -> bool:
    """Whether what is pruned is found on trajectories for prompts, as in ESD, rather than on images."""
    return config.section(PruningConfig).objective == "esd"


def needs(config: Config) -> Requirements:
    if prunes_by_prompts(config):
        return Requirements(retain=False, forget=False)
    return Requirements(relabel=erasediff.needs(config).relabel)


def defaults(config: Config, _space: Space) -> dict[str, float | int]:
    """Scores are learned at a rate of their own; without learning, observations are steps."""
    settings = config.section(PruningConfig)
    if settings.learned:
        return {"lr": settings.lr}
    return {} if settings.mask is not None else {"steps": settings.observations + settings.finetune_steps}


SPEC = MethodSpec(
    name="pruning",
    summary="masks over weights, learned (arXiv 2405.16534) or training-free (ConceptPrune, arXiv 2405.19237)",
    config=PruningConfig,
    reads=lambda config: SOLVER_KEYS | {"barrier", "eta"} if prunes_by_prompts(config) else erasediff.READS,
    sections=("esd",),
    defaults=defaults,
    needs=needs,
    trained=trained,
    build=build,
    finalize=finalize,
    single_process_reason="the masks that it leaves, and its report of neurons, are made of whole weights",
)

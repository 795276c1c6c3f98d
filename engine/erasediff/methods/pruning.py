"""Pruning for concept erasing by learned weight masks (arXiv 2405.16534, P-ESD), or by ``concept_prune``."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from erasediff.config import Config
from erasediff.config.fields import Count, CountOrZero, NonNegative, Positive, Section, Share
from erasediff.diffusion.batch import Batch
from erasediff.errors import RunFailedError, UserError
from erasediff.io.atomic import atomic_write
from erasediff.methods import erasediff, esd
from erasediff.methods.activation_stats import (
    InputNorms,
    Observation,
    Observations,
    concept_neurons,
    of_batches,
    on_trajectories,
    over_inputs,
)
from erasediff.methods.barriers import StepValues
from erasediff.methods.base import Solver
from erasediff.methods.concept_prune import HeldMask
from erasediff.methods.erasediff import EraseDiff
from erasediff.methods.esd import ESD
from erasediff.methods.spec import SOLVER_KEYS, UNTIL_KEYS, BuildContext, MethodSpec, Requirements
from erasediff.models.diffusion_model import Space
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

Batches = Callable[[int], Iterable[Batch]]
"""The first batches, as many as are asked for."""


class LearnedMask(Solver):
    """Descent on the scores of a network's masks, with a penalty on the pruned share.

    The gradient of ``sparsity_weight`` mean(1 - sigmoid(s)) is added to that of the scores s. It is taken from the
    scores themselves, wherever their shards are, so it needs no backward pass.

    Args:
        *args: as in the class that this is mixed into, as ``options``.
        sparsity_weight: of the penalty, not negative.

    Raises:
        ValueError: for a network without masks, or a negative weight.
    """

    def __init__(self, *args: Any, sparsity_weight: float = 0.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.sparsity_weight = sparsity_weight
        self.score_count = sum(mask.score.numel() for _, _, mask in weight_masks(self.model))
        if not self.score_count:
            raise ValueError("the network has no masks to learn: add_masks to it, and train their scores")
        if sparsity_weight < 0:
            raise ValueError(f"sparsity_weight must not be negative, got {sparsity_weight}")

    @abstractmethod
    def observations(self, count: int) -> Iterator[Observation]:
        """As many observations of the concept and of what is to stay, the same at every call."""

    def _values(self, retain: list[Tensor], forget: list[Tensor], **losses: Tensor | None) -> StepValues:
        scale = -self.sparsity_weight / self.score_count
        for gradient, score in zip(retain, self.gradients.weights(), strict=True):
            sigmoid = torch.sigmoid(score.detach().to(gradient.dtype))
            gradient.add_(sigmoid * (1 - sigmoid), alpha=scale)
        return super()._values(retain, forget, **losses)


class PrunedESD(LearnedMask, ESD):
    """min over M of L_ESD(theta o M), M in {0, 1} per weight, theta frozen (2405.16534, P-ESD).

    The paper publishes neither relaxation nor schedule. Ours: M = 1[sigmoid(s) > 1/2] with a straight-through gradient,
    every score s at ``initial_score`` first, and a penalty on the pruned share. A pruned weight can come back. Only
    weights that the concept drives may go (``correlated``), and what the network predicts for other prompts is
    preserved (``references`` of ``ESD``): without either, all weights come near the threshold together, and the network
    is lost at once. The frozen model is the same network without its masks: no second copy.

    Args:
        *args: as in ``ESD``, as ``options``; no teacher. The optimizer trains the scores that ``add_masks`` returns.
        sparsity_weight: see ``LearnedMask``.
    """

    name: ClassVar[str] = "pruning"

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        with without_masks(self.model):
            yield self.model

    def observations(self, count: int) -> Iterator[Observation]:
        return on_trajectories(self, count)


class PrunedEraseDiff(LearnedMask, EraseDiff):
    """As ``PrunedESD``, with EraseDiff's two losses and its multiplier (ours).

    Args:
        *args: as in ``EraseDiff``, as ``options``. The optimizer trains the scores that ``add_masks`` returns.
        retain_batches: the first batches of retained data, as many as are asked for: for ``observations`` alone.
        forget_batches: likewise.
        sparsity_weight: see ``LearnedMask``.
    """

    name: ClassVar[str] = "pruning"

    def __init__(
        self, *args: Any, retain_batches: Batches | None = None, forget_batches: Batches | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.retain_batches, self.forget_batches = retain_batches, forget_batches

    def observations(self, count: int) -> Iterator[Observation]:
        if self.retain_batches is None or self.forget_batches is None:
            raise ValueError("observations are of batches: give PrunedEraseDiff retain_batches and forget_batches")
        return of_batches(self, self.retain_batches, self.forget_batches, count)


@torch.no_grad()
def correlated(method: Solver, observations: Observations, count: int) -> dict[str, Tensor]:
    """|w| (|x| under the concept - |x| elsewhere) of each masked weight.

    |x| is the root mean square of the weight's input. The paper finds a concept's neurons by their activations before
    and after erasing; here the comparison is between prompts, so that it can be made before.

    Args:
        method: whose masked network is observed.
        observations: of the concept and of what is to stay.
        count: how many.

    Returns:
        By the masked module's name, a tensor like its weight.
    """
    layers = {name: module for name, module, _ in weight_masks(method.model)}
    norms = InputNorms.none(layers, 1, method.device)
    for observation in observations(count):
        norms.observe(method, layers, observation)
    importance = {}
    for name, _, _ in weight_masks(method.model):
        elsewhere, concept = norms.norms(name)[:, 0]
        weight: Any = layers[name].weight
        importance[name] = weight.abs() * over_inputs(weight, concept - elsewhere)
    return importance


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
    finetune_steps: CountOrZero = 0
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
    options: dict[str, Any] = {"process": context.process, **context.options}
    if settings.learned:
        options["sparsity_weight"] = settings.sparsity_weight
    if settings.objective == "esd":
        options |= _prompt_options(context)
        if settings.learned:
            return _limited(PrunedESD(context.network, context.optimizer, **options), settings)
        by_prompts = ESD(context.network, context.optimizer, teacher=context.teacher(), **options)
        return _held(context, by_prompts, partial(on_trajectories, by_prompts))
    options |= erasediff.erasediff_options(context)
    batches = {"retain_batches": context.retain_batches, "forget_batches": context.forget_batches}
    if settings.learned:
        return _limited(PrunedEraseDiff(context.network, context.optimizer, **options, **batches), settings)
    by_images = EraseDiff(context.network, context.optimizer, **options)
    return _held(context, by_images, partial(of_batches, by_images, context.retain_batches, context.forget_batches))


PrunedT = TypeVar("PrunedT", PrunedESD, PrunedEraseDiff)


def _limited(method: PrunedT, settings: PruningConfig) -> PrunedT:
    """``method`` with only those weights open to pruning that the concept drives most."""
    importance = correlated(method, method.observations, settings.observations)
    limit_masks(method.model, importance, settings.share)
    return method


def _held(context: BuildContext, tuned: ESD | EraseDiff, observations: Observations) -> HeldMask:
    settings = context.config.section(PruningConfig)
    for _, _, mask in weight_masks(context.teacher()):
        mask.active = False
    return HeldMask(
        tuned,
        observations,
        masks=None if settings.mask is None else load_masks(settings.mask),
        count=settings.observations,
        share=settings.share,
        bins=settings.timestep_bins,
    )


def _prompt_options(context: BuildContext) -> dict[str, Any]:
    """Keywords of ``ESD`` with references. UserError for an odd batch."""
    config = context.config
    settings = config.section(PruningConfig)
    if context.batch_size % 2:
        raise UserError("Half of a batch of pruning is of prompts to retain; give an even unlearn.batch_size.")
    attack = settings.attack_prompts
    return esd.esd_options(context) | {
        "references": esd.floats(context.encode_prompts(_reference_prompts(config))),
        "barrier": erasediff.barrier_of(config.unlearn),
        "attack": esd.floats(context.encode_prompts(attack)) if attack else None,
    }


def _reference_prompts(config: Config) -> list[str]:
    """The prompts whose predictions are preserved."""
    erase_from = config.section(esd.EsdConfig).erase_from
    return [*(config.images.retain_prompts or (() if erase_from is None else (erase_from,))), ""]


def encoded_prompts(config: Config) -> list[list[str]]:
    """The lists of prompts that ``build`` encodes."""
    if not prunes_by_prompts(config):
        return []
    attack = list(config.section(PruningConfig).attack_prompts)
    return [*esd.encoded_prompts(config), _reference_prompts(config), attack]


def finalize(method: Solver, path: Path) -> None:
    """Make the masks part of the model, and write them and the neurons that they are about beside it.

    Raises:
        RunFailedError: No weight was pruned; nothing is written.
    """
    assert isinstance(method, PrunedESD | PrunedEraseDiff | HeldMask)
    solver = method.tuned if isinstance(method, HeldMask) else method
    if all(bool((mask.score > 0).all()) for _, _, mask in weight_masks(solver.model)):
        raise RunFailedError(
            "No weight was pruned, so the model was not saved: raise pruning.share, the learning rate or the number of "
            "steps, or lower pruning.sparsity_weight."
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
    observed = max(config.section(PruningConfig).observations, NEURON_OBSERVATIONS)
    return Requirements(relabel=erasediff.needs(config).relabel, batches=observed)


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
    reads=lambda config: (
        SOLVER_KEYS | {"barrier", "eta", "level"} if prunes_by_prompts(config) else erasediff.READS - UNTIL_KEYS
    ),
    sections=("esd",),
    defaults=defaults,
    needs=needs,
    prompts=encoded_prompts,
    trained=trained,
    build=build,
    finalize=finalize,
    single_process_reason="the masks that it leaves, and its report of neurons, are made of whole weights",
)

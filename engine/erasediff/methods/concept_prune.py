"""ConceptPrune: masks computed from activations, or given, held while the surviving weights are tuned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor

from erasediff.diffusion.batch import Batch
from erasediff.errors import UserError
from erasediff.methods.activation_stats import InputNorms, Observation, Observations, over_inputs
from erasediff.methods.base import Solver, StepReport
from erasediff.methods.erasediff import EraseDiff
from erasediff.methods.esd import ESD
from erasediff.models.weight_masks import OUT_OF_REACH, weight_masks
from erasediff.parallel.gradient_store import Shard


class HeldMask(Solver):
    """ConceptPrune (arXiv 2405.19237): weights go whose Wanda score |w| |x| is the concept's own; nothing is learned.

    The first ``count`` steps only look; then a weight is pruned if, in any bin of timesteps, its score under the
    concept is among the largest ``share`` of its neuron's and larger than that elsewhere. Every further step is one of
    ``tuned``, which trains the surviving weights under the mask: what is pruned has no gradient. The paper prunes the
    second layers of the feed-forward blocks, 1% of each neuron's weights per timestep, over early timesteps; here the
    selection of layers is the caller's, and every bin counts.

    Args:
        tuned: trains the surviving weights; its network has masks.
        observations: of the concept and of what is to stay.
        masks: given ones to hold, bool by the weights' names; nothing is looked at then.
        count: observations.
        share: of each neuron's weights, the most that are pruned per bin.
        bins: equal ranges of timesteps.

    Raises:
        UserError: for masks of other weights.
    """

    name: ClassVar[str] = "pruning"

    def __init__(
        self,
        tuned: ESD | EraseDiff,
        observations: Observations,
        *,
        masks: Mapping[str, Tensor] | None,
        count: int,
        share: float,
        bins: int,
    ) -> None:
        # One model, optimizer and gradient store for both.
        super().__init__(
            tuned.model,
            process=tuned.objective.process,
            gradients=tuned.gradients,
            seed=tuned.seed,
            max_grad_norm=tuned.max_grad_norm,
            accumulation_steps=tuned.accumulation_steps,
        )
        self.objective = tuned.objective
        self.tuned = tuned
        self.observations = observations
        self.share = share
        self.layers = {name: module for name, module, _ in weight_masks(tuned.model)}
        self.norms = InputNorms.none(self.layers, bins, tuned.device)
        self.observation_count = count if masks is None else 0
        self.observed = 0
        self._upcoming: Iterator[Observation] | None = None
        if masks is not None:
            self._hold({name.removesuffix(".weight"): mask for name, mask in masks.items()})

    @property
    def updates(self) -> int:
        return self.tuned.updates

    def step(self, retain: Batch, forget: Batch) -> StepReport:
        """Take one observation, or one step of ``tuned``."""
        report = StepReport()
        if self.observed == self.observation_count:
            report = self.tuned.step(retain, forget)
        else:
            self._observe()
        self.iteration = self.observed + self.tuned.iteration
        self.skipped = self.tuned.skipped
        return report

    def _observe(self) -> None:
        if self._upcoming is None:
            self._upcoming = islice(self.observations(self.observation_count), self.observed, None)
        self.norms.observe(self.tuned, self.layers, next(self._upcoming))
        self.observed += 1
        if self.observed == self.observation_count:
            self._hold({name: ~self._pruned(name) for name in self.layers})

    @torch.no_grad()
    def _pruned(self, name: str) -> Tensor:
        """Bool, like the layer's weight."""
        layer: Any = self.layers[name]
        weight = layer.weight
        pruned = torch.zeros_like(weight, dtype=torch.bool)
        for elsewhere, concept in self.norms.norms(name).unbind(1):
            scores = weight.abs() * over_inputs(weight, concept)
            exceeding = over_inputs(weight, concept > elsewhere)
            pruned |= most_important_per_neuron(scores, self.share) & exceeding
        return pruned

    @torch.no_grad()
    def _hold(self, masks: Mapping[str, Tensor]) -> None:
        scores = {name: mask.score for name, _, mask in weight_masks(self.tuned.model)}
        for name, bits in masks.items():
            if name not in scores or scores[name].shape != bits.shape:
                raise UserError(f"pruning.mask is not of these weights: {name} is not selected, or of another shape.")
            scores[name].copy_(torch.where(bits.to(scores[name].device), OUT_OF_REACH, -OUT_OF_REACH))

    def shards(self) -> Iterator[Shard]:
        raise ValueError("a held mask and its observations are of whole weights: train it in one process")

    def state_dict(self) -> dict[str, Any]:
        masks = {name: mask.score > 0 for name, _, mask in weight_masks(self.tuned.model)}
        norms = {"squares": self.norms.squares, "counts": self.norms.counts}
        return {"tuned": self.tuned.state_dict(), "looked": self.observed, "seen": norms, "masks": masks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tuned.load_state_dict(state["tuned"])
        self.skipped = self.tuned.skipped
        self.observed = int(state["looked"])
        self.iteration = self.observed + self.tuned.iteration
        self.norms = InputNorms(state["seen"]["squares"], state["seen"]["counts"])
        self._hold(state["masks"])


def most_important_per_neuron(importance: Tensor, share: float) -> Tensor:
    """Bool, like ``importance`` [neurons, inputs, ...]: where positive and among the largest ``share`` of its row."""
    rows = importance.flatten(1)
    count = max(1, round(share * rows.shape[1]))
    chosen = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, rows.topk(count, dim=1).indices, True)
    return chosen.view_as(importance) & (importance > 0)

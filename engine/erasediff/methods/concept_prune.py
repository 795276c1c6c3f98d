"""A mask that is not learned: computed from activations or given, then held while the surviving weights are tuned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor

from erasediff.diffusion.batch import Batch
from erasediff.errors import UserError
from erasediff.methods.activation_stats import InputNorms, Observation, Observations, over_inputs
from erasediff.methods.base import StepReport
from erasediff.methods.erasediff import EraseDiff
from erasediff.methods.esd import ESD
from erasediff.models.weight_masks import OUT_OF_REACH, most_important, weight_masks


class HeldMask:
    """ConceptPrune (arXiv 2405.19237): weights go whose Wanda score |w| |x| is the concept's own; nothing is learned.

    The first ``count`` steps only look; then a weight is pruned if, in any bin of timesteps, its score under the
    concept is among the largest ``share`` of its neuron's and larger than that elsewhere. Every further step is one of
    ``tuned``, which trains the surviving weights under the mask: what is pruned has no gradient. The paper prunes the
    second layers of the feed-forward blocks, 1% of each neuron's weights per timestep, over early timesteps; here the
    selection of layers is the caller's, and every bin counts.

    masks: given ones to hold, bool by the weights' names; nothing is looked at then
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
        self.tuned = tuned
        self.observations = observations
        self.share = share
        self.layers = {name: module for name, module, _ in weight_masks(tuned.model)}
        self.seen = InputNorms.none(self.layers, bins, tuned.device)
        self.looks = count if masks is None else 0
        self.looked = 0
        self.ahead: Iterator[Observation] | None = None
        if masks is not None:
            self._hold({name.removesuffix(".weight"): mask for name, mask in masks.items()})

    @property
    def iteration(self) -> int:
        return self.looked + self.tuned.iteration

    @property
    def gradients(self) -> Any:
        return self.tuned.gradients

    def step(self, retain: Batch, forget: Batch) -> StepReport:
        """One look, or one step of ``tuned``."""
        if self.looked == self.looks:
            return self.tuned.step(retain, forget)
        if self.ahead is None:
            self.ahead = islice(self.observations(self.looks), self.looked, None)
        self.seen.observe(self.tuned, self.layers, next(self.ahead))
        self.looked += 1
        if self.looked == self.looks:
            self._hold({name: ~self._pruned(name) for name in self.layers})
        return StepReport()

    @torch.no_grad()
    def _pruned(self, name: str) -> Tensor:
        """Bool, like the layer's weight."""
        layer: Any = self.layers[name]
        weight = layer.weight
        pruned = torch.zeros_like(weight, dtype=torch.bool)
        for elsewhere, concept in self.seen.norms(name).unbind(1):
            scores = weight.abs() * over_inputs(weight, concept)
            exceeding = over_inputs(weight, concept > elsewhere)
            pruned |= torch.stack([most_important(row, self.share) for row in scores]) & exceeding
        return pruned

    @torch.no_grad()
    def _hold(self, masks: Mapping[str, Tensor]) -> None:
        own = {name: mask for name, _, mask in weight_masks(self.tuned.model)}
        for name, bits in masks.items():
            if name not in own or own[name].score.shape != bits.shape:
                raise UserError(f"pruning.mask is not of these weights: {name} is not selected, or of another shape.")
            own[name].score.copy_(torch.where(bits.to(own[name].score.device), OUT_OF_REACH, -OUT_OF_REACH))

    def state_dict(self) -> dict[str, Any]:
        masks = {name: mask.score > 0 for name, _, mask in weight_masks(self.tuned.model)}
        seen = {"squares": self.seen.squares, "counts": self.seen.counts}
        return {"tuned": self.tuned.state_dict(), "looked": self.looked, "seen": seen, "masks": masks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tuned.load_state_dict(state["tuned"])
        self.looked = int(state["looked"])
        self.seen = InputNorms(state["seen"]["squares"], state["seen"]["counts"])
        self._hold(state["masks"])

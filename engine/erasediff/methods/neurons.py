"""Which neurons a pruning is about: switched off by it, and perhaps woken again by an attack (arXiv 2405.16534)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from erasediff.methods.activations import recorded_outputs
from erasediff.methods.observing import Observation
from erasediff.models.masks import weight_masks, without_masks
from erasediff.solver import Solver

REPORTED = 100


@torch.no_grad()
def concept_neurons(method: Solver, observations: Iterable[Observation]) -> list[dict[str, Any]]:
    """The neurons of masked layers with the largest correlation to the concept, largest first.

    A neuron is an output of a masked layer, z its mean magnitude over an image's positions, over x_t of the concept.
    correlation: E |z| of the original - E |z| of the pruned model, on the concept (the paper's rho)
    sensitivity: E | z under an attack prompt - z under the concept |, both of the pruned model; only where there are
                 attack prompts. The sources cut the paper's delta off: this is the reading of its definition in words.
    """
    layers = {name: module for name, module, _ in weight_masks(method.model)}
    sums: dict[str, dict[str, Tensor]] = {"correlation": {}, "sensitivity": {}}
    count = 0

    def magnitudes(seen: Observation, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with recorded_outputs(layers) as outputs:
            method.objective.prediction(method.model, seen.sample, seen.timesteps, condition)
        return {name: value[seen.of_concept] for name, value in outputs.items()}

    for seen in observations:
        if not bool(seen.of_concept.any()):
            continue
        with without_masks(method.model):
            original = magnitudes(seen, seen.condition)
        pruned = magnitudes(seen, seen.condition)
        _add(sums["correlation"], {name: original[name] - pruned[name] for name in layers})
        if seen.attack is not None:
            attacked = magnitudes(seen, seen.attack)
            _add(sums["sensitivity"], {name: (attacked[name] - pruned[name]).abs() for name in layers})
        count += int(seen.of_concept.sum())
    rows = []
    for name, correlation in sums["correlation"].items():
        for neuron in correlation.topk(min(REPORTED, correlation.numel())).indices.tolist():
            numbers = {kind: float(of_layer[name][neuron]) / count for kind, of_layer in sums.items() if of_layer}
            rows.append({"layer": name, "neuron": neuron, **numbers})
    return sorted(rows, key=lambda row: -row["correlation"])[:REPORTED]


def _add(sums: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value.sum(0)

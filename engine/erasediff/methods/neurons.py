"""Which neurons a pruning is about: switched off by it, and perhaps woken again by an attack (arXiv 2405.16534)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from erasediff.methods.esd import ESD
from erasediff.models.masks import weight_masks, without_masks

REPORTED = 100


@torch.no_grad()
def concept_neurons(method: ESD, iterations: int = 8) -> list[dict[str, Any]]:
    """The neurons of masked layers with the largest correlation to the concept, largest first.

    A neuron is an output of a masked layer, z its mean magnitude over an image's positions, over x_t of the pool and t.
    correlation: E |z| of the original - E |z| of the pruned model, on the concept (the paper's rho)
    sensitivity: E | z under an attack prompt - z under the concept |, both of the pruned model; only where there are
                 attack prompts. The sources cut the paper's delta off: this is the reading of its definition in words.
    """
    layers = {name: module for name, module, _ in weight_masks(method.model)}
    pool = method.trajectories
    original: dict[str, Any] = dict.fromkeys(layers, 0.0)
    pruned, attacked = original.copy(), original.copy()
    sample = method.states()
    for index in range(iterations):
        iteration = method.iteration + index
        concept = method.condition(iteration)
        with without_masks(method.model):
            of_original = _magnitudes(method, layers, sample, iteration, concept)
        of_pruned = _magnitudes(method, layers, sample, iteration, concept)
        found = [of_original, of_pruned]
        if method.attack is not None:
            of_attack = _magnitudes(method, layers, sample, iteration, method.condition(iteration, method.attack))
            found.append({name: (of_attack[name] - of_pruned[name]).abs() for name in layers})
        # The last sum has nothing to add without an attack.
        for total, values in zip((original, pruned, attacked), found, strict=False):
            for name in layers:
                total[name] = total[name] + values[name].mean(0) / iterations
        concept_prediction, null = method.frozen_pair(sample, iteration)
        sample = pool.advanced(sample, torch.lerp(null, concept_prediction, method.guidance_scale), iteration)
    rows = []
    for name in layers:
        correlation: Tensor = original[name] - pruned[name]
        for neuron in correlation.topk(min(REPORTED, correlation.numel())).indices.tolist():
            row = {"layer": name, "neuron": neuron, "correlation": float(correlation[neuron])}
            if method.attack is not None:
                row["sensitivity"] = float(attacked[name][neuron])
            rows.append(row)
    return sorted(rows, key=lambda row: -row["correlation"])[:REPORTED]


def _magnitudes(
    method: ESD, layers: Mapping[str, nn.Module], sample: Tensor, iteration: int, condition: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """[B, neurons] of each layer."""
    with _recording(layers) as outputs:
        method.objective.prediction(method.model, sample, method.trajectories.times(iteration), condition)
    return outputs


@contextmanager
def _recording(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    outputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, layer in layers.items():

            def record(module: nn.Module, _: Any, output: Tensor, name: str = name) -> None:
                # Channels are last, but for convolutions.
                value = output.movedim(1, -1) if isinstance(module, nn.Conv2d) else output
                outputs[name] = value.detach().float().abs().flatten(1, -2).mean(1)

            stack.callback(layer.register_forward_hook(record).remove)
        yield outputs

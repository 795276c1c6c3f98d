"""Activation statistics of layers under a concept and under what is to stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from erasediff.diffusion.batch import Batch, condition_of, with_sample_ids
from erasediff.diffusion.rng import NoiseRole, noise_key
from erasediff.methods.base import Solver
from erasediff.methods.esd import ESD
from erasediff.models.weight_masks import weight_masks, without_masks


@contextmanager
def recorded_inputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Record E x^2 over a sample's positions in each forward pass within the block: float32 [B, inputs] by layer."""
    inputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, layer in layers.items():

            def record(module: nn.Module, given: Any, name: str = name) -> None:
                inputs[name] = _channels_last(module, given[0]).square().mean(1)

            stack.callback(layer.register_forward_pre_hook(record).remove)
        yield inputs


@contextmanager
def recorded_outputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Record E |z| over a sample's positions in each forward pass within the block: float32 [B, neurons] by layer."""
    outputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, layer in layers.items():

            def record(module: nn.Module, _: Any, output: Tensor, name: str = name) -> None:
                outputs[name] = _channels_last(module, output).abs().mean(1)

            stack.callback(layer.register_forward_hook(record).remove)
        yield outputs


def _channels_last(layer: nn.Module, value: Tensor) -> Tensor:
    """float32 [B, positions, channels]."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        value = value.movedim(1, -1)
    return value.detach().float().reshape(value.shape[0], -1, value.shape[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """States that a network is observed at.

    Attributes:
        sample: x_t [B, ...].
        timesteps: int64 [B].
        condition: of each state.
        of_concept: bool [B], whether a state belongs to the concept.
        attack: the conditions with the concept's replaced by some that are to bring it back; None without any.
    """

    sample: Tensor
    timesteps: Tensor
    condition: Mapping[str, Tensor]
    of_concept: Tensor
    attack: Mapping[str, Tensor] | None = None


Observations = Callable[[int], Iterator[Observation]]
"""As many observations as are asked for, the same at every call."""


@torch.no_grad()
def on_trajectories(method: ESD, count: int) -> Iterator[Observation]:
    """Observe prompts, on the frozen model's trajectories from where the method's pool is, ``count`` times."""
    sample = method.states()
    for iteration in range(method.iteration, method.iteration + count):
        yield Observation(
            sample=sample,
            timesteps=method.trajectories.times(iteration),
            condition=method.condition(iteration),
            of_concept=method.of_concept(),
            attack=None if method.attack is None else method.condition(iteration, method.attack),
        )
        concept, null = method.frozen_pair(sample, iteration)
        guided = torch.lerp(null, concept, method.guidance_scale)
        sample = method.trajectories.advanced(sample, guided, iteration)


@torch.no_grad()
def of_batches(
    method: Solver, retain: Callable[[int], Iterable[Batch]], forget: Callable[[int], Iterable[Batch]], count: int
) -> Iterator[Observation]:
    """Observe ``count`` batches of images of each kind, with noise addressed by (seed, number of the batch)."""
    roles = ((NoiseRole.RETAIN_NOISE, NoiseRole.RETAIN_TIMESTEP), (NoiseRole.FORGET_NOISE, NoiseRole.FORGET_TIMESTEP))
    objective = dataclasses.replace(method.objective, antithetic=False)
    for index, batches in enumerate(zip(retain(count), forget(count), strict=True)):
        key = noise_key(method.seed, index, method.device)
        parts = []
        for batch, (noise, timestep) in zip(batches, roles, strict=True):
            batch = with_sample_ids(batch)
            sample, timesteps = objective.noised(batch, key, noise, timestep)
            parts.append({**batch, "sample": sample, "timesteps": timesteps})
        # Buckets of other sizes cannot share a forward pass.
        shares_a_pass = parts[0]["sample"].shape[1:] == parts[1]["sample"].shape[1:]
        for together in [(0, 1)] if shares_a_pass else [(0,), (1,)]:
            yield _observation([parts[number] for number in together], together)


def _observation(parts: Sequence[Batch], concept: Sequence[int]) -> Observation:
    """Observation of noisy batches of one size, of which those with a 1 in ``concept`` belong to the concept."""
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    timesteps = joined.pop("timesteps")
    marks = [timesteps.new_full((len(part["timesteps"]),), mark) for part, mark in zip(parts, concept, strict=True)]
    return Observation(
        sample=joined["sample"],
        timesteps=timesteps,
        condition=condition_of(joined),
        of_concept=torch.cat(marks).bool(),
    )


@dataclass(frozen=True, slots=True)
class InputNorms:
    """Sums of mean squares [2, bins, inputs] of layers' inputs, and counts of samples [2, bins].

    Row 1 is the concept's; the bins are equal ranges of timesteps.
    """

    squares: dict[str, Tensor]
    counts: Tensor

    @classmethod
    def none(cls, layers: Mapping[str, nn.Module], bins: int, device: torch.device) -> InputNorms:
        weights: dict[str, Any] = {name: layer.weight for name, layer in layers.items()}
        squares = {name: torch.zeros(2, bins, weight.shape[1], device=device) for name, weight in weights.items()}
        return cls(squares, torch.zeros(2, bins, device=device))

    @torch.no_grad()
    def observe(self, method: Solver, layers: Mapping[str, nn.Module], observation: Observation) -> None:
        """Add the layers' inputs in one forward pass."""
        objective = method.objective
        bins = self.counts.shape[1]
        bin_of_time = observation.timesteps * bins // objective.process.num_train_timesteps
        row = observation.of_concept * bins + bin_of_time
        with recorded_inputs(layers) as inputs:
            objective.prediction(method.model, observation.sample, observation.timesteps, observation.condition)
        for name, values in inputs.items():
            self.squares[name].flatten(0, 1).index_add_(0, row, values)
        self.counts.flatten().index_add_(0, row, torch.ones_like(row, dtype=self.counts.dtype))

    def norms(self, name: str) -> Tensor:
        """Root mean squares, [2, bins, inputs]."""
        return (self.squares[name] / self.counts.clamp(min=1)[:, :, None]).sqrt()


def over_inputs(weight: Tensor, values: Tensor) -> Tensor:
    """``values`` [inputs] as a factor of a layer's weight [neurons, inputs, ...]."""
    return values.view(-1, *(1,) * (weight.ndim - 2))


REPORTED = 100


@torch.no_grad()
def concept_neurons(method: Solver, observations: Iterable[Observation]) -> list[dict[str, Any]]:
    """The neurons of masked layers with the largest correlation to the concept, largest first.

    A neuron is an output of a masked layer, z its mean magnitude over an image's positions, over x_t of the concept.

    Args:
        method: whose masked model is observed.
        observations: of the concept.

    Returns:
        Rows ``{"layer", "neuron", "correlation", "sensitivity"}``. correlation: E |z| of the original - E |z| of the
        pruned model, on the concept (the paper's rho). sensitivity: E | z under an attack prompt - z under the
        concept |, both of the pruned model; only where there are attack prompts. The sources cut the paper's delta off:
        this is the reading of its definition in words.
    """
    layers = {name: module for name, module, _ in weight_masks(method.model)}
    sums: dict[str, dict[str, Tensor]] = {"correlation": {}, "sensitivity": {}}
    count = 0

    def magnitudes(observation: Observation, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with recorded_outputs(layers) as outputs:
            method.objective.prediction(method.model, observation.sample, observation.timesteps, condition)
        return {name: value[observation.of_concept] for name, value in outputs.items()}

    for observation in observations:
        if not bool(observation.of_concept.any()):
            continue
        with without_masks(method.model):
            original = magnitudes(observation, observation.condition)
        pruned = magnitudes(observation, observation.condition)
        _add(sums["correlation"], {name: original[name] - pruned[name] for name in layers})
        if observation.attack is not None:
            attacked = magnitudes(observation, observation.attack)
            _add(sums["sensitivity"], {name: (attacked[name] - pruned[name]).abs() for name in layers})
        count += int(observation.of_concept.sum())
    rows = []
    for name, correlation in sums["correlation"].items():
        for neuron in correlation.topk(min(REPORTED, correlation.numel())).indices.tolist():
            numbers = {kind: float(of_layer[name][neuron]) / count for kind, of_layer in sums.items() if of_layer}
            rows.append({"layer": name, "neuron": neuron, **numbers})
    return sorted(rows, key=lambda row: -row["correlation"])[:REPORTED]


def _add(sums: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value.sum(0)

"""Forward passes of a concept and of what is to stay, for those who look into the network meanwhile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from erasediff.methods.activations import recorded_inputs
from erasediff.methods.esd import ESD
from erasediff.objectives import Batch, with_sample_ids
from erasediff.objectives.batch import condition_of
from erasediff.process import NoiseRole, noise_key
from erasediff.solver import Solver


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """States x_t [B, ...] and their conditions, of which ``of_concept`` bool [B] belong to the concept.

    attack: the conditions with the concept's replaced by some that are to bring it back; None without any
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
    """Of prompts, on the frozen model's trajectories, from where the method's pool is."""
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
    """Of images, noised to timesteps of their own; the noise is addressed by (seed, number of the batch)."""
    roles = ((NoiseRole.RETAIN_NOISE, NoiseRole.RETAIN_TIMESTEP), (NoiseRole.FORGET_NOISE, NoiseRole.FORGET_TIMESTEP))
    objective = dataclasses.replace(method.objective, antithetic=False)
    for index, batches in enumerate(zip(retain(count), forget(count), strict=True)):
        key = noise_key(method.seed, index, method.device)
        parts = []
        for batch, (noise, timestep) in zip(batches, roles, strict=True):
            batch = with_sample_ids(batch)
            sample, timesteps = objective.noised(batch, key, noise, timestep)
            parts.append({**batch, "sample": sample, "timesteps": timesteps})
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        timesteps = joined.pop("timesteps")
        yield Observation(
            sample=joined["sample"],
            timesteps=timesteps,
            condition=condition_of(joined),
            of_concept=torch.arange(len(timesteps), device=method.device) >= len(parts[0]["timesteps"]),
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
    def observe(self, method: Solver, layers: Mapping[str, nn.Module], seen: Observation) -> None:
        """Add what the network's layers get to see in one pass."""
        objective = method.objective
        bins = self.counts.shape[1]
        place = seen.of_concept * bins + seen.timesteps * bins // objective.process.num_train_timesteps
        with recorded_inputs(layers) as inputs:
            objective.prediction(method.model, seen.sample, seen.timesteps, seen.condition)
        for name, values in inputs.items():
            self.squares[name].flatten(0, 1).index_add_(0, place, values)
        self.counts.flatten().index_add_(0, place, torch.ones_like(place, dtype=self.counts.dtype))

    def norms(self, name: str) -> Tensor:
        """Root mean squares, [2, bins, inputs]."""
        return (self.squares[name] / self.counts.clamp(min=1)[:, :, None]).sqrt()


def over_inputs(weight: Tensor, values: Tensor) -> Tensor:
    """``values`` [inputs] as a factor of a layer's weight [neurons, inputs, ...]."""
    return values.view(-1, *(1,) * (weight.ndim - 2))

"""How an optimizer's parameters are divided among calls of an operator."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor


@dataclass(kw_only=True, slots=True)
class Bucket:
    """What one call of the operator is about: parameters of one group, of one kind and on one device.

    `places` are those of its parameters in the group; None for all of them.
    """

    dtype: torch.dtype
    device: torch.device
    has_master: bool
    has_mask: bool
    places: list[int] | None
    params: list[Tensor]
    states: list[dict[str, Tensor]]

    def state(self, name: str) -> list[Tensor]:
        return shards([state[name] for state in self.states])

    def chosen(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Its own of the gradients of the group; none of none."""
        if self.places is None or not gradients:
            return shards(list(gradients))
        return shards([gradients[place] for place in self.places])


@dataclass(kw_only=True, slots=True)
class Division:
    """The buckets of a group, kept for as long as what they follow from is the same."""

    params: list[Tensor]
    states: list[dict[str, Tensor]]
    all_states: list[Any]
    facts: tuple[Any, ...]
    buckets: list[Bucket]

    def holds(self, params: Sequence[Tensor], all_states: Collection[Any]) -> bool:
        """Whether parameters and state are those that were divided: the same objects, whatever they contain."""
        return (
            len(params) == len(self.params)
            and len(all_states) == len(self.all_states)
            and all(map(is_, params, self.params))
            and all(map(is_, all_states, self.all_states))
        )


def shards(tensors: list[Tensor]) -> list[Tensor]:
    """This rank's shards of distributed tensors; other tensors themselves."""
    if set(map(type, tensors)) <= {Tensor, torch.nn.Parameter}:
        return tensors
    return [cast(Tensor, tensor.to_local()) if hasattr(tensor, "to_local") else tensor for tensor in tensors]

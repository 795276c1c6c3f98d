"""Buckets of an optimizer's parameters: those that one call of an operator updates."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor


@dataclass(kw_only=True, slots=True)
class Bucket:
    """Parameters of one group, of one dtype and on one device, with the same kinds of state.

    Attributes:
        indices: places of the bucket's parameters in the group; None for all of them.
    """

    dtype: torch.dtype
    device: torch.device
    has_master: bool
    has_mask: bool
    indices: list[int] | None
    params: list[Tensor]
    states: list[dict[str, Tensor]]

    def state(self, name: str) -> list[Tensor]:
        """One state tensor of each parameter; this rank's shards of distributed ones."""
        return local_shards([state[name] for state in self.states])

    def select(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of the bucket's parameters among those of the group; empty for empty."""
        if self.indices is None or not gradients:
            return local_shards(list(gradients))
        return local_shards([gradients[index] for index in self.indices])


@dataclass(kw_only=True, slots=True)
class BucketCache:
    """The buckets of a group, kept for as long as nothing that they follow from changes.

    Attributes:
        params, states: of the group, in its order.
        all_states: every state of the optimizer: a new or replaced one makes the buckets stale.
        key: what else the buckets follow from, from `bucket_key`.
    """

    params: list[Tensor]
    states: list[dict[str, Tensor]]
    all_states: list[Any]
    key: tuple[Any, ...]
    buckets: list[Bucket]

    def is_valid_for(self, params: Sequence[Tensor], all_states: Collection[Any], group: dict[str, Any]) -> bool:
        """Compare by identity: the same parameters and states, whatever they contain, and an equal key."""
        return (
            len(params) == len(self.params)
            and len(all_states) == len(self.all_states)
            and all(map(is_, params, self.params))
            and all(map(is_, all_states, self.all_states))
            and bucket_key(params, self.states, group) == self.key
        )


def bucket_key(params: Sequence[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> tuple[Any, ...]:
    """Settings, dtypes and masks that the buckets of these parameters and states follow from."""
    settings = (group["moments"], group["ema_decay"] is not None, group["master_weights"])
    device = params[0].device if params else None
    return settings, device, [p.dtype for p in params], ["mask" in state for state in states]


def make_buckets(params: Sequence[Tensor], states: list[dict[str, Tensor]]) -> list[Bucket]:
    """Buckets of a group, in the order of their first parameters."""
    indices_by_kind: dict[Any, list[int]] = defaultdict(list)
    for index, (p, state) in enumerate(zip(params, states, strict=True)):
        indices_by_kind[p.dtype, p.device, "master" in state, "mask" in state].append(index)
    return [
        Bucket(
            dtype=dtype,
            device=device,
            has_master=has_master,
            has_mask=has_mask,
            indices=indices if len(indices_by_kind) > 1 else None,
            params=[params[index] for index in indices],
            states=[states[index] for index in indices],
        )
        for (dtype, device, has_master, has_mask), indices in indices_by_kind.items()
    ]


def local_shards(tensors: list[Tensor]) -> list[Tensor]:
    """This rank's shards of distributed tensors; other tensors themselves."""
    if set(map(type, tensors)) <= {Tensor, torch.nn.Parameter}:
        return tensors
    return [cast(Tensor, tensor.to_local()) if hasattr(tensor, "to_local") else tensor for tensor in tensors]

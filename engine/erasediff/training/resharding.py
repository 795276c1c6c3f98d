"""A checkpoint's trained state in fragments of parameters, of which a rank of any layout reads what overlaps its own.

Every rank writes one file: its fragments (parameter, key such as "weight" or "exp_avg", first element, elements), and
what is the same on all ranks. A checkpoint of one process, in whole tensors, can be read the same way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from erasediff.errors import UserError
from erasediff.io.state_file import StoredTensor, load_state, open_state
from erasediff.methods import Solver
from erasediff.parallel.gradient_store import Shard


class Piece(NamedTuple):
    """Contiguous elements of a flattened parameter from ``start`` on, in a file or in memory (full checkpoints)."""

    start: int
    elements: StoredTensor | Tensor


class Fragments:
    """Pieces of the state in a checkpoint, by (parameter, key), for restoring it in any layout."""

    def __init__(self, path: Path, pieces: Mapping[tuple[str, str], list[Piece]], scalars: dict[str, Tensor]) -> None:
        self._path = path
        self._pieces = pieces
        self._scalars = scalars

    @torch.no_grad()
    def restore(self, method: Solver) -> None:
        """Load this rank's part of the state into ``method``. UserError if the checkpoint lacks any of it."""
        for shard in chain(method.shards(), method.own_shards()):
            for key, tensor in _filled(shard):
                tensor.copy_(self._read(shard.name, key, shard.start, tensor.numel()).view_as(tensor))
        if missing := method.scalars().keys() - self._scalars.keys():
            raise self._lacks(sorted(missing)[0])
        method.load_scalars(self._scalars)

    def _read(self, name: str, key: str, start: int, count: int) -> Tensor:
        """Read elements ``start`` to ``start + count`` of the flattened parameter from the overlapping pieces."""
        overlapping = []
        for piece in self._pieces.get((name, key), ()):
            first, last = max(start, piece.start), min(start + count, piece.start + piece.elements.shape[0])
            if first < last:
                overlapping.append((first, piece.elements[first - piece.start : last - piece.start]))
        position = start
        for first, elements in sorted(overlapping, key=lambda part: part[0]):
            if first != position:
                break
            position += len(elements)
        if position != start + count:
            raise self._lacks(f"{key} of {name}")
        return torch.cat([elements for _, elements in sorted(overlapping, key=lambda part: part[0])])

    def _lacks(self, what: str) -> UserError:
        return UserError(f"The checkpoint {self._path} holds no {what}: it is of a run of another kind.")


def to_shards(method: Solver, *, with_shards: bool) -> dict[str, Any]:
    """State of this rank to write; without ``with_shards``, only what differs between ranks, and scalars."""
    shards: Iterable[Shard] = method.shards() if with_shards else ()
    fragments = [
        (shard.name, key, shard.start, tensor.detach().reshape(-1).cpu())
        for shard in chain(shards, method.own_shards())
        for key, tensor in _filled(shard)
    ]
    return {"fragments": fragments, "scalars": method.scalars()}


def _filled(shard: Shard) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a shard that are not empty, as FSDP's are for parameters with fewer rows than ranks."""
    return ((key, tensor) for key, tensor in shard.tensors.items() if tensor.numel())


@contextmanager
def open_fragments(path: Path, files: Iterable[Path]) -> Iterator[Fragments]:
    """Open the fragments in ``files``: names and sizes are read now, tensors on demand."""
    pieces: defaultdict[tuple[str, str], list[Piece]] = defaultdict(list)
    scalars: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for file in files:
            state = stack.enter_context(open_state(file))
            for name, key, start, stored in state["fragments"]:
                pieces[name, key].append(Piece(start, stored))
            scalars = {name: stored.load() for name, stored in state["scalars"].items()}
        yield Fragments(path, pieces, scalars)


def from_full_checkpoint(path: Path, file: Path) -> Fragments:
    """Read a checkpoint of one process as fragments."""
    state = load_state(file)
    method = state["method"]["state"]
    optimizer = method["optimizer"]
    aligned = {key: value for key, value in method.items() if isinstance(value, list)}
    numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
    pieces: dict[tuple[str, str], list[Piece]] = {}
    for index, name in enumerate(state["parameters"]):
        weight = state["model"][name]
        moments = optimizer["state"].get(numbers[index], {})
        tensors = {key: value for key, value in moments.items() if key != "mask" and value.shape == weight.shape}
        tensors["weight"] = tensors.pop("master", weight)
        tensors |= {key: values[index] for key, values in aligned.items()}
        pieces |= {(name, key): [Piece(0, value.reshape(-1))] for key, value in tensors.items()}
    method_tensors = {key: value for key, value in method.items() if isinstance(value, Tensor) and value.ndim}
    pieces |= {(key, key): [Piece(0, value.reshape(-1))] for key, value in method_tensors.items()}
    scalars = {"iteration": torch.tensor(method["iteration"]), "skipped": method["skipped"]}
    scalars |= {f"group.{number}.step": group["step"] for number, group in enumerate(optimizer["param_groups"])}
    scalars |= {f"barrier.{name}": value for name, value in method.get("barrier", {}).items()}
    return Fragments(path, pieces, scalars)

"""State files: a tree of tensors and plain values as one safetensors file, bit for bit, without pickle.

The tensors are the file's tensors; the tree around them is JSON in its header, where ``{"$tensor": name}`` stands for a
tensor. Lists, tuples, dicts with keys of any plain kind, None, bool, int, float and str come back as they were, except
that a dict's text keys come back sorted: equal states are equal files, in whatever order they were put together.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from erasediff.errors import UserError

# The one entry of the metadata: safetensors writes several in random order.
FORMAT = "erasediff-state-1"


def save_state(state: Any, path: Path) -> None:
    """Write ``state`` to ``path``. ValueError for a value of a kind that the file cannot hold."""
    encoder = _Encoder()
    tree = json.dumps(encoder.encode(state), allow_nan=False)
    save_file(encoder.tensors, path, metadata={FORMAT: tree})


def load_state(path: Path, device: torch.device | str = "cpu") -> Any:
    """Read what ``save_state`` wrote, with the tensors on ``device``. UserError for a file that is not whole."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            # Cloned, because safetensors may map the file, and a mapping's alignment is not that of fresh memory.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    if FORMAT not in metadata:
        raise UserError(f"{path} is not a saved state of this program.")
    return _decode(json.loads(metadata[FORMAT]), tensors)


class StoredTensor:
    """A tensor that stays on the disk until it is asked for; a slice reads the rows that it names."""

    def __init__(self, file: Any, name: str) -> None:
        self._file = file
        self._name = name
        self.shape = tuple(file.get_slice(name).get_shape())

    def load(self) -> Tensor:
        tensor: Tensor = self._file.get_tensor(self._name)
        return tensor.clone()

    def __getitem__(self, rows: slice) -> Tensor:
        tensor: Tensor = self._file.get_slice(self._name)[rows]
        return tensor


@contextmanager
def open_state(path: Path) -> Iterator[Any]:
    """As ``load_state``, with ``StoredTensor``s in the tensors' places, which can be read within the block."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if FORMAT not in metadata:
                raise UserError(f"{path} is not a saved state of this program.")
            stored = {name: StoredTensor(file, name) for name in file.keys()}  # noqa: SIM118
            yield _decode(json.loads(metadata[FORMAT]), stored)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None


class _Encoder:
    """Walks a tree once; a tensor met twice is stored once and comes back as one tensor."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}
        self._storages: set[int] = set()

    def encode(self, value: Any) -> Any:
        match value:
            case None | bool() | int() | str():
                return value
            case float():
                return value if math.isfinite(value) else {"$float": repr(value)}
            case Tensor():
                return {"$tensor": self._store(value)}
            case list():
                return [self.encode(item) for item in value]
            case tuple():
                return {"$tuple": [self.encode(item) for item in value]}
            case dict() if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: self.encode(value[key]) for key in sorted(value)}
            case dict():
                return {"$items": [[self.encode(key), self.encode(item)] for key, item in value.items()]}
        raise ValueError(f"a state holds tensors and plain values, not {type(value).__name__}")

    def _store(self, tensor: Tensor) -> str:
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        name = self._names.get(place) if tensor.numel() else None
        if name is None:
            name = f"{len(self.tensors):06d}"
            self._names[place] = name
            self.tensors[name] = self._alone_in_memory(tensor.detach())
        return name

    def _alone_in_memory(self, tensor: Tensor) -> Tensor:
        """``tensor``, contiguous and sharing its memory with no other: what safetensors accepts."""
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.element_size()
        if whole and storage.data_ptr() not in self._storages:
            self._storages.add(storage.data_ptr())
            return tensor
        return tensor.clone(memory_format=torch.contiguous_format)


def _decode(node: Any, tensors: Mapping[str, Any]) -> Any:
    match node:
        case list():
            return [_decode(item, tensors) for item in node]
        case {"$tensor": name}:
            return tensors[name]
        case {"$float": text}:
            return float(text)
        case {"$tuple": items}:
            return tuple(_decode(item, tensors) for item in items)
        case {"$items": items}:
            return {_decode(key, tensors): _decode(item, tensors) for key, item in items}
        case dict():
            return {key: _decode(item, tensors) for key, item in node.items()}
    return node

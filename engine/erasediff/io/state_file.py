"""State files: a tree of tensors and plain values as one safetensors file, bit for bit, without pickle.

The tensors are the file's tensors; the tree around them is JSON in its header, where ``{"$tensor": name}`` stands for a
tensor. Lists, tuples, dicts with keys of any plain kind, None, bool, int, float and str come back as they were, except
that a dict's text keys come back sorted: equal states are equal files, in whatever order they were put together.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from erasediff.errors import UserError
from erasediff.io import tensor_file
from erasediff.io.json_file import parse_json
from erasediff.io.user_file import check_regular

FORMAT = "erasediff-state-1"
"""The one entry of the metadata: safetensors' own writer has several in random order."""
HEADER_ALIGNMENT = 8
ORDER = (
    "BOOL",
    "U8",
    "I8",
    "F8_E5M2",
    "F8_E4M3",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "F64",
    "I64",
    "U64",
)
"""Kinds of tensors, last ones first in a file, as safetensors' own writer orders them."""
CONTIGUOUS = torch.contiguous_format


def save_state(state: Any, path: Path) -> str:
    """Write ``state`` to ``path`` and return the SHA-256 of the file, in hex.

    Raises:
        ValueError: A value is of a type that the file cannot hold.
        OSError: The disk refuses.
    """
    return HostState(*_encoded(state, copied=False)).save(path)


@dataclass(frozen=True, slots=True)
class HostState:
    """Copy of a state on the host, ready to be written while the original changes."""

    tree: str
    tensors: dict[str, Tensor]

    @classmethod
    def copy_of(cls, state: Any) -> HostState:
        """Copy ``state``, wherever its tensors are. Raises ``ValueError`` as ``save_state``."""
        return cls(*_encoded(state, copied=True))

    def save(self, path: Path) -> str:
        """Write the state and return its SHA-256; the bytes are those of ``safetensors.torch.save_file``."""
        tensors = {
            name: tensor_file.StoredTensor(tensor.dtype, tuple(tensor.shape), partial(_identity, tensor))
            for name, tensor in self.tensors.items()
        }
        ordered = sorted(tensors.items(), key=lambda item: (-ORDER.index(tensor_file.CODES[item[1].dtype]), item[0]))
        with path.open("wb") as file:
            hashing = _HashingSink(file)
            tensor_file.write_tensors(hashing, ordered, {FORMAT: self.tree}, alignment=HEADER_ALIGNMENT)
        return hashing.digest.hexdigest()


class _HashingSink:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self.digest.update(data)
        self._file.write(data)


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _encoded(state: Any, *, copied: bool) -> tuple[str, dict[str, Tensor]]:
    """JSON of the tree, and its tensors by name."""
    encoder = _Encoder(copied=copied)
    return json.dumps(encoder.encode(state), allow_nan=False), encoder.tensors


def load_state(path: Path, device: torch.device | str = "cpu") -> Any:
    """Read a file of ``save_state``, with the tensors on ``device``. UserError for a damaged file."""
    check_regular(path)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            # Cloned, because safetensors may map the file, and a mapping's alignment is not that of fresh memory.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    return _tree(path, metadata, tensors)


class StoredTensor:
    """Tensor on the disk, read by ``load``; a slice reads its rows only."""

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
    """Open a state file lazily: as ``load_state``, with ``StoredTensor``s, which can be read within the block."""
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: StoredTensor(file, name) for name in file.keys()}  # noqa: SIM118
            yield _tree(path, file.metadata() or {}, stored)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None


class _Encoder:
    """Encoder of a tree; a tensor met twice is stored once and comes back as one tensor."""

    def __init__(self, *, copied: bool) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._copied = copied
        self._names: dict[tuple[Any, ...], str] = {}

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
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        name = self._names.get(identity) if tensor.numel() else None
        if name is None:
            name = f"{len(self.tensors):06d}"
            self._names[identity] = name
            tensor = tensor.detach()
            self.tensors[name] = tensor.to("cpu", copy=True, memory_format=CONTIGUOUS) if self._copied else tensor
        return name


def _tree(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Any]) -> Any:
    """The state that a file's metadata describe. UserError where they do not, or name tensors that are not there."""
    if FORMAT not in metadata:
        raise UserError(f"{path} is not a saved state of this program.")
    try:
        return _decode(parse_json(metadata[FORMAT]), tensors)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged: its description of the state cannot be read ({error}).") from None


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

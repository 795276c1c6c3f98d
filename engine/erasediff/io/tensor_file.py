"""Tensor files: safetensors read and written one tensor at a time, so that no checkpoint is in memory twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from erasediff.errors import UserError, reason
from erasediff.io.file_faults import fault_of
from erasediff.io.json_file import parse_object
from erasediff.io.user_file import check_regular

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
ALIGNMENT = 64
LARGEST_SIDE = 2**40
LazyWeights = Mapping[str, Callable[[], Tensor]]
"""Entries of a module's state_dict, each read from the disk when it is called."""
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Tensor in a file, known by dtype and shape, and read to the host by ``load``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def cast(self, dtype: torch.dtype | None) -> StoredTensor:
        """Cast to another floating dtype; integers, and everything for None, stay as they are."""
        if dtype in (None, self.dtype) or not self.dtype.is_floating_point:
            return self
        return StoredTensor(dtype, self.shape, lambda: self.load().to(dtype))

    def updated(self, current: Tensor, dtype: torch.dtype | None = None) -> StoredTensor:
        """Update with a trained value: ``current``, or this tensor if ``current`` still equals it in its own dtype.

        Training in another dtype than the stored one therefore changes no bit of what was not trained.

        Args:
            current: Trained value, rounded once, to ``dtype``.
            dtype: Floating dtype of the result; None for this tensor's. Integers keep theirs.
        """
        target = dtype if dtype is not None and self.dtype.is_floating_point else self.dtype

        def load() -> Tensor:
            stored, value = self.load(), current.detach().cpu()
            return (stored if torch.equal(stored.to(value.dtype), value) else value).to(target)

        return StoredTensor(target, self.shape, load)

    def changed(self, change: Callable[[Tensor], Tensor]) -> StoredTensor:
        """This tensor after ``change``, in this dtype."""
        return StoredTensor(self.dtype, self.shape, lambda: change(self.load()).to(self.dtype))

    def reshaped(self, *shape: int) -> StoredTensor:
        return StoredTensor(self.dtype, shape, lambda: self.load().reshape(shape))

    def transposed(self) -> StoredTensor:
        return StoredTensor(self.dtype, self.shape[::-1], lambda: self.load().T)

    def part(self, index: int, count: int) -> StoredTensor:
        """Part ``index`` of ``count`` equal parts along the first dimension."""
        shape = (self.shape[0] // count, *self.shape[1:])
        return StoredTensor(self.dtype, shape, lambda: self.load().chunk(count)[index])

    @staticmethod
    def joined(parts: Sequence[StoredTensor]) -> StoredTensor:
        """Concatenate parts along the first dimension, in the widest of their dtypes: the inverse of ``part``."""
        widest = max(parts, key=lambda part: part.dtype.itemsize)
        shape = (widest.shape[0] * len(parts), *widest.shape[1:])
        return StoredTensor(widest.dtype, shape, lambda: torch.cat([part.load().to(widest.dtype) for part in parts]))


@dataclass(frozen=True, slots=True)
class TensorFile:
    """Tensors and metadata of one safetensors file."""

    path: Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read the header. UserError for a file that is missing or damaged, or holds a dtype that is not known here."""
        check_regular(path)
        try:
            handle: Any = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read as safetensors: {_reason(path, error)}.") from error
        return cls(path, {name: _stored(path, handle, name) for name in handle.keys()}, handle.metadata() or {})  # noqa: SIM118


def _stored(path: Path, handle: Any, name: str) -> StoredTensor:
    view = handle.get_slice(name)
    code = view.get_dtype()
    if code not in DTYPES:
        raise UserError(
            f"{path} holds {name} as {code}, which is not known here: give the weights in float32, float16 or bfloat16."
        )
    shape = tuple(view.get_shape())
    if max(shape, default=0) > LARGEST_SIDE:
        # Only an empty tensor may say so: elements must be there.
        raise UserError(f"{path} is damaged: {name} has {max(shape)} rows or columns.")
    return StoredTensor(DTYPES[code], shape, lambda: handle.get_tensor(name))


def _reason(path: Path, error: Exception) -> str:
    if "incomplete metadata" in str(error):
        return "it is cut short; download or copy it again"
    return fault_of(path) or reason(error)


def read_header(path: Path) -> bytes:
    """Read all that a safetensors file has before its first tensor. UserError as ``TensorFile.open``."""
    TensorFile.open(path)
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(int.from_bytes(length, "little"))


def tensors_in_order(header: bytes) -> list[str]:
    """Names of the tensors of a ``read_header`` in the order of their bytes. ValueError for one that is damaged."""
    entries = {name: entry for name, entry in parse_object(header[8:]).items() if name != "__metadata__"}
    return sorted(entries, key=lambda name: (entries[name]["data_offsets"], name))


class ByteSink(Protocol):
    """Destination of bytes, such as a file open for writing."""

    def write(self, data: bytes | memoryview, /) -> object: ...


def write_tensor_file(path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with one tensor in memory at a time."""
    # Tensors of odd sizes last: all others then begin at a multiple of ALIGNMENT, for readers that map the file.
    ordered = sorted(tensors.items(), key=lambda item: _place_in_file(*item))
    with path.open("wb") as file:
        write_tensors(file, ordered, dict(sorted(metadata.items())), alignment=ALIGNMENT)


def write_tensors(
    file: ByteSink, ordered: Sequence[tuple[str, StoredTensor]], metadata: Mapping[str, str], *, alignment: int
) -> None:
    """Write the content of a safetensors file, in the given order, with one tensor in memory at a time.

    Format: https://huggingface.co/docs/safetensors, an 8-byte length, a JSON header, then the tensors without gaps.

    Args:
        file: Destination of the bytes.
        ordered: The tensors by name, in the order of the file.
        metadata: Metadata of the header.
        alignment: Alignment of the first tensor, in bytes; the header is padded with spaces.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    begin = 0
    for name, tensor in ordered:
        end = begin + tensor.nbytes
        header[name] = {"dtype": CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": (begin, end)}
        begin = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % alignment)
    file.write(len(encoded).to_bytes(8, "little"))
    file.write(encoded)
    for _, tensor in ordered:
        file.write(tensor_bytes(tensor.load()))


def _place_in_file(name: str, tensor: StoredTensor) -> tuple[bool, int, str]:
    return tensor.nbytes % ALIGNMENT > 0, -tensor.dtype.itemsize, name


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Elements of a tensor in row-major order, without a copy if they lie so on the host."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def shards(tensors: Mapping[str, StoredTensor], max_bytes: int) -> list[dict[str, StoredTensor]]:
    """Group ``tensors`` in their order into shards of at most ``max_bytes``; a larger tensor has its own shard."""
    groups: list[dict[str, StoredTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    return groups


def fingerprint(described: object, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 in hex over ``described`` (by its repr) and each tensor's name, dtype, shape and elements, in order."""
    digest = hashlib.sha256(repr(described).encode())
    for name, tensor in tensors:
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()

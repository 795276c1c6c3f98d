"""Patches are made of two checkpoints, tensor by tensor."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from erasediff.data.survey import ahead
from erasediff.errors import UserError
from erasediff.io.atomic import atomic_file, check_new, storage_errors
from erasediff.io.tensor_file import CODES, StoredTensor, read_header, tensor_bytes, write_tensor_file
from erasediff.provenance.canonical import canonical_json
from erasediff.provenance.digests import TENSOR_FILE, file_sha256, tensor_sha256
from erasediff.provenance.patch_file import (
    FORMAT,
    FORMAT_KEY,
    INDEX,
    SIDES,
    SIZE_KEY,
    CheckpointParts,
    FileEntry,
    PairEntry,
    PatchIndex,
    TensorEntry,
)
from erasediff.provenance.tensor_delta import compress, delta

PAIRS_AHEAD = 4
"""Pairs of tensors in memory at once."""


@dataclass(frozen=True, slots=True)
class PatchSummary:
    """Result of making a patch.

    Attributes:
        patch: The file.
        patch_bytes: Its size.
        model_bytes: Size of the checkpoint that it makes.
        tensors: Tensors of both checkpoints.
        changed: Those of them that the patch holds.
    """

    patch: Path
    patch_bytes: int
    model_bytes: int
    tensors: int
    changed: int


def make_patch(base: Path, model: Path, out: Path) -> PatchSummary:
    """Write the difference of ``model`` from ``base``, both folders or both single files, to the file ``out``.

    Raises:
        UserError: A checkpoint cannot be read, one is a folder and the other a file, ``out`` exists, or the disk
            refuses.
    """
    if out.suffix != TENSOR_FILE:
        raise UserError(f"A patch is a safetensors file: call it {out.with_suffix(TENSOR_FILE)}.")
    check_new(out)
    before, after = CheckpointParts.of(base), CheckpointParts.of(model)
    if before.is_file != after.is_file:
        raise UserError(f"{base} and {model} are a folder and a single file: give both in one layout.")
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent) as spool:
            pieces = _Pieces(spool)
            index = _describe(before, after, pieces)
            content = canonical_json(index.model_dump(exclude_defaults=True))
            pieces.add(INDEX, content)
            with atomic_file(out) as partial_file:
                write_tensor_file(partial_file, pieces.stored, {FORMAT_KEY: FORMAT, SIZE_KEY: str(len(content))})
    return PatchSummary(
        patch=out,
        patch_bytes=out.stat().st_size,
        model_bytes=sum(entry.bytes for entry in index.after.values()),
        tensors=len(index.tensors),
        changed=sum(pair.stored != "same" for pair in index.tensors.values()),
    )


class _Pieces:
    """Compressed pieces, kept in a file on the disk until the sizes of all are known."""

    def __init__(self, spool: BinaryIO) -> None:
        self._spool = spool
        self.stored: dict[str, StoredTensor] = {}

    def add(self, name: str, content: bytes | memoryview) -> None:
        self.add_compressed(name, compress(content))

    def add_compressed(self, name: str, content: bytes) -> None:
        if name not in self.stored:
            place = self._spool.seek(0, 2)
            self._spool.write(content)
            self.stored[name] = StoredTensor(torch.uint8, (len(content),), partial(self._read, place, len(content)))

    def _read(self, place: int, size: int) -> Tensor:
        self._spool.seek(place)
        return torch.from_numpy(np.frombuffer(bytearray(self._spool.read(size)), np.uint8))


def _describe(before: CheckpointParts, after: CheckpointParts, pieces: _Pieces) -> PatchIndex:
    """Index of a patch, whose pieces are added on the way."""
    files = {side: _file_entries(parts) for side, parts in zip(SIDES, (before, after), strict=True)}
    for parts, entries in ((before, files["before"]), (after, files["after"])):
        for name, entry in entries.items():
            if entry.header is not None:
                pieces.add(f"blob:{entry.header}", read_header(parts.files[name]))
            elif files["before"].get(name) != files["after"].get(name):
                pieces.add(f"blob:{entry.sha256}", parts.files[name].read_bytes())
    pairs: dict[str, PairEntry] = {}
    names = sorted(before.tensors.keys() | after.tensors.keys())
    for name, (pair, contents) in zip(
        names, ahead(lambda n: _pair(before.tensors.get(n), after.tensors.get(n)), names, PAIRS_AHEAD), strict=True
    ):
        pairs[name] = pair
        for kind, content in contents.items():
            pieces.add_compressed(f"{kind}:{name}", content)
    return PatchIndex(is_file=before.is_file, before=files["before"], after=files["after"], tensors=pairs)


def _file_entries(parts: CheckpointParts) -> dict[str, FileEntry]:
    def entry(name: str) -> FileEntry:
        path = parts.files[name]
        header = read_header(path) if name.endswith(TENSOR_FILE) else None
        return FileEntry(
            bytes=path.stat().st_size,
            sha256=file_sha256(path),
            header=None if header is None else hashlib.sha256(header).hexdigest(),
            header_bytes=0 if header is None else len(header),
        )

    return dict(zip(parts.files, ahead(entry, parts.files), strict=True))


def _pair(before: StoredTensor | None, after: StoredTensor | None) -> tuple[PairEntry, Mapping[str, bytes]]:
    """Entry of a tensor of two checkpoints, and the compressed pieces that it needs."""
    entries = [None if tensor is None else _tensor_entry(tensor) for tensor in (before, after)]
    if entries[0] == entries[1]:
        return PairEntry(before=entries[0], after=entries[1], stored="same"), {}
    if (
        before is not None
        and after is not None
        and before.nbytes // before.dtype.itemsize == (after.nbytes // after.dtype.itemsize)
    ):
        change = delta(before.load(), after.load())
        if change is not None:
            return PairEntry(before=entries[0], after=entries[1], stored="delta"), {"delta": change}
    whole: dict[str, bytes] = {
        side: compress(tensor_bytes(tensor.load()))
        for side, tensor in zip(SIDES, (before, after), strict=True)
        if tensor is not None
    }
    return PairEntry(before=entries[0], after=entries[1], stored="whole"), whole


def _tensor_entry(tensor: StoredTensor) -> TensorEntry:
    return TensorEntry(dtype=CODES[tensor.dtype], shape=list(tensor.shape), sha256=tensor_sha256(tensor))

"""Patch files: the difference of two checkpoints as one safetensors file of compressed pieces.

Each piece is a U8 tensor: ``index``, which is canonical JSON; ``blob:SHA-256``, a small file or the header of a weight
file; ``delta:NAME``, by which a tensor is changed in either direction; ``before:NAME`` and ``after:NAME``, tensors that
have no delta, or that only one of the checkpoints has. The index lists the files and tensors of both checkpoints with
their hashes, so both are made bit for bit, whichever way their tensors are spread over files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from erasediff.errors import UserError
from erasediff.io.json_file import parse_object
from erasediff.io.tensor_file import DTYPES, StoredTensor, TensorFile, tensor_bytes
from erasediff.io.user_file import MEGABYTE
from erasediff.models.checkpoint.links import check_plain_name
from erasediff.models.checkpoint.opening import open_checkpoint
from erasediff.provenance.digests import TENSOR_FILE
from erasediff.provenance.run_files import checkpoint_files
from erasediff.provenance.tensor_delta import decompress

FORMAT = "erasediff-patch-1"
FORMAT_KEY, SIZE_KEY = "format", "index_bytes"
INDEX = "index"
LARGEST_INDEX = 100 * MEGABYTE
LARGEST_PIECE = 2**40
ALONE = "model.safetensors"
"""Name in an index of a checkpoint that is one file, whatever it is called on the disk."""
Side = Literal["before", "after"]
SIDES: tuple[Side, Side] = ("before", "after")

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0, le=2**62)]


class Entry(BaseModel):
    """Base of what an index holds: strict, since it comes from outside."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileEntry(Entry):
    """A file of a checkpoint.

    Attributes:
        bytes: Its size.
        sha256: Of its content.
        header: SHA-256 of the header of a weight file; None for another file.
        header_bytes: Its size.
    """

    bytes: Size
    sha256: Digest
    header: Digest | None = None
    header_bytes: Size = 0


class TensorEntry(Entry):
    """A tensor of a checkpoint: safetensors' dtype, the shape, and ``tensor_sha256``."""

    dtype: Annotated[str, Field(pattern=r"^[A-Z0-9_]+$")]
    shape: list[Size]
    sha256: Digest


class PairEntry(Entry):
    """A tensor in both checkpoints; None where one lacks it.

    Attributes:
        before: In the base.
        after: In the model.
        stored: "same", "delta", or "whole" for each side by itself.
    """

    before: TensorEntry | None
    after: TensorEntry | None
    stored: Literal["same", "delta", "whole"]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stored != "whole" and (self.before is None or self.after is None):
            raise PydanticCustomError("one_side", "A tensor of one checkpoint is stored whole")
        return self

    def side(self, side: Side) -> TensorEntry | None:
        return self.before if side == "before" else self.after


class PatchIndex(Entry):
    """Index of a patch: whether the checkpoints are single files, their files, and the tensors of either."""

    is_file: bool
    before: dict[str, FileEntry]
    after: dict[str, FileEntry]
    tensors: dict[str, PairEntry]

    def files(self, side: Side) -> dict[str, FileEntry]:
        return self.before if side == "before" else self.after


@dataclass(frozen=True, slots=True)
class CheckpointParts:
    """Files of a checkpoint on the disk, and the tensors of its weight files under ``tensor_key``."""

    path: Path
    is_file: bool
    files: Mapping[str, Path]
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def of(cls, path: Path) -> CheckpointParts:
        """Parts of a diffusers folder, or of one safetensors file of any kind. UserError for neither."""
        if path.is_file() and path.suffix == TENSOR_FILE:
            return cls(path, True, {ALONE: path}, {tensor_key(ALONE, n): t for n, t in _tensors(path)})
        files = dict(checkpoint_files(open_checkpoint(path)))
        weights = {name: file for name, file in files.items() if name.endswith(TENSOR_FILE)}
        tensors = {tensor_key(name, key): tensor for name, file in weights.items() for key, tensor in _tensors(file)}
        return cls(path, False, files, tensors)


def tensor_key(file: str, tensor: str) -> str:
    """Name of a tensor in a patch: that of its file's folder and its own, so that it may move between shards."""
    folder = file.rpartition("/")[0]
    return f"{folder}/{tensor}" if folder else tensor


def _tensors(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    yield from TensorFile.open(path).tensors.items()


@dataclass(frozen=True, slots=True)
class Patch:
    """A patch that has been opened: its index, and the pieces that are read when they are needed."""

    path: Path
    index: PatchIndex
    pieces: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, path: Path) -> Patch:
        """Read the index of a patch. UserError for a file that is none, or is damaged."""
        if not path.is_file():
            raise UserError(f"There is no patch {path}: make one with erasediff patch make.")
        file = TensorFile.open(path)
        if file.metadata.get(FORMAT_KEY) != FORMAT or INDEX not in file.tensors:
            raise UserError(f"{path} is no patch: give a file of erasediff patch make.")
        try:
            size = int(file.metadata.get(SIZE_KEY, ""))
            if not 0 < size <= LARGEST_INDEX:
                raise ValueError(f"an index of {size} bytes")
            content = decompress(tensor_bytes(file.tensors[INDEX].load()), size)
            index = PatchIndex.model_validate(parse_object(content))
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{path} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from None
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}.") from None
        patch = cls(path, index, file.tensors)
        patch._check_names()
        return patch

    def _check_names(self) -> None:
        if self.index.is_file and not {*self.index.before} == {*self.index.after} == {ALONE}:
            raise UserError(f"{self.path} is damaged: it is for single files, and lists others.")
        for name in {*self.index.before, *self.index.after}:
            for part in name.split("/"):
                check_plain_name(part, self.path)
        unknown = {
            entry.dtype for pair in self.index.tensors.values() for entry in (pair.before, pair.after) if entry
        } - DTYPES.keys()
        if unknown:
            raise UserError(f"{self.path} is damaged: there is no dtype {min(unknown)}.")

    def piece(self, name: str) -> memoryview:
        """A compressed piece. UserError where it is missing."""
        if name not in self.pieces:
            raise UserError(f"{self.path} is damaged: it has no {name}.")
        return tensor_bytes(self.pieces[name].load())

    def blob(self, digest: str, size: int) -> bytes:
        """A small file or a header. UserError where it is missing or damaged."""
        return self.whole(f"blob:{digest}", size)

    def whole(self, name: str, size: int) -> bytes:
        """A piece of ``size`` bytes when it is not compressed. UserError where it is missing or damaged."""
        if size > LARGEST_PIECE:
            raise UserError(f"{self.path} is damaged: {name} has {size} bytes.")
        try:
            return decompress(self.piece(name), size)
        except ValueError as error:
            raise UserError(f"{self.path} is damaged: {name}: {error}.") from None

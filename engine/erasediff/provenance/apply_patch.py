"""Patches are applied to a checkpoint, or reverted, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from math import prod
from pathlib import Path

from erasediff.data.survey import ahead
from erasediff.errors import UserError
from erasediff.io.atomic import atomic_directory, atomic_file, check_new
from erasediff.io.tensor_file import DTYPES, StoredTensor, tensor_bytes, tensors_in_order
from erasediff.provenance.digests import TENSOR_FILE, file_sha256, tensor_sha256
from erasediff.provenance.patch_file import (
    ALONE,
    CheckpointParts,
    FileEntry,
    Patch,
    Side,
    TensorEntry,
    tensor_key,
)
from erasediff.provenance.tensor_delta import apply_delta


def apply_patch(model: Path, patch: Path, out: Path, *, revert: bool = False) -> None:
    """Write the checkpoint that ``patch`` makes of ``model`` to ``out``, a folder or file as ``model`` is one.

    Every tensor of ``model`` is compared with the patch first, and every file that is written with its hash, before it
    appears.

    Args:
        model: The base of the patch, or with ``revert`` the model that it makes. Its tensors may be spread over files
            in another way.
        patch: A file of ``make_patch``.
        out: Path of the checkpoint.
        revert: Make the base of the model.

    Raises:
        UserError: ``model`` is another checkpoint, which names its first tensor or file that is; a file is damaged;
            ``out`` exists, or the disk refuses.
    """
    opened = Patch.open(patch)
    if opened.index.is_file and out.suffix != TENSOR_FILE:
        raise UserError(f"The patch {patch} makes a single file: call it {out}{TENSOR_FILE}.")
    check_new(out)
    _Application(opened, CheckpointParts.of(model), "after" if revert else "before").write(out)


class _Application:
    def __init__(self, patch: Patch, parts: CheckpointParts, side: Side) -> None:
        self.patch, self.parts, self.side = patch, parts, side
        self.target: Side = "before" if side == "after" else "after"
        self._check()

    def _check(self) -> None:
        """UserError for another checkpoint than the patch is for."""
        index, parts = self.patch.index, self.parts
        what = "base" if self.side == "before" else "model"
        if index.is_file != parts.is_file:
            kinds = ("a folder", "a single file")
            raise UserError(f"{parts.path} is {kinds[parts.is_file]}, but the patch is for {kinds[index.is_file]}.")
        expected = {name: entry for name, pair in index.tensors.items() if (entry := pair.side(self.side))}
        names = sorted(expected.keys() | parts.tensors.keys())
        for name, fault in zip(
            names, ahead(lambda n: _fault(expected.get(n), parts.tensors.get(n)), names), strict=True
        ):
            if fault is not None:
                raise UserError(f"{parts.path} is not the {what} of the patch {self.patch.path}: {name} {fault}.")
        for name, file in index.files(self.side).items():
            # A file that both have is copied from here; the patch holds all others.
            if file.header is None and index.files(self.target).get(name) == file:
                path = parts.files.get(name)
                if path is None or file_sha256(path) != file.sha256:
                    fault = "is missing" if path is None else "is another file"
                    raise UserError(f"{parts.path} is not the {what} of the patch {self.patch.path}: {name} {fault}.")

    def write(self, out: Path) -> None:
        files = self.patch.index.files(self.target)
        if self.patch.index.is_file:
            with atomic_file(out) as partial:
                self._write_file(partial, ALONE, files[ALONE])
            return
        with atomic_directory(out) as folder:
            for name, entry in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                self._write_file(folder / name, name, entry)

    def _write_file(self, path: Path, name: str, entry: FileEntry) -> None:
        digest = hashlib.sha256()
        with path.open("wb") as file:
            for content in self._content(name, entry):
                digest.update(content)
                file.write(content)
        if digest.hexdigest() != entry.sha256:
            raise UserError(f"The patch {self.patch.path} is damaged: it makes another {name} than it says.")

    def _content(self, name: str, entry: FileEntry) -> Iterator[bytes | memoryview]:
        if entry.header is None:
            same = self.patch.index.files(self.side).get(name) == entry
            yield self.parts.files[name].read_bytes() if same else self.patch.blob(entry.sha256, entry.bytes)
            return
        header = self.patch.blob(entry.header, entry.header_bytes)
        yield header
        try:
            names = tensors_in_order(header)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"The patch {self.patch.path} is damaged: the header of {name} is none.") from None
        for tensor in names:
            yield self._elements(tensor_key(name, tensor))

    def _elements(self, name: str) -> bytes | memoryview:
        pair = self.patch.index.tensors.get(name)
        wanted = None if pair is None else pair.side(self.target)
        if pair is None or wanted is None:
            raise UserError(f"The patch {self.patch.path} is damaged: its index lacks {name}.")
        dtype, shape = DTYPES[wanted.dtype], tuple(wanted.shape)
        if pair.stored == "whole":
            return self.patch.whole(f"{self.target}:{name}", prod(shape) * dtype.itemsize)
        source = self.parts.tensors[name].load()
        if pair.stored == "same":
            return tensor_bytes(source)
        try:
            return tensor_bytes(apply_delta(source, self.patch.piece(f"delta:{name}"), dtype, shape))
        except ValueError as error:
            raise UserError(f"The patch {self.patch.path} is damaged: {name}: {error}.") from None


def _fault(expected: TensorEntry | None, found: StoredTensor | None) -> str | None:
    if expected is None:
        return "is not in it"
    if found is None:
        return "is missing"
    return None if tensor_sha256(found) == expected.sha256 else "is another tensor"

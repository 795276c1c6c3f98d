"""SHA-256 of files and of every tensor in them, streamed and in several threads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from erasediff.errors import UserError
from erasediff.io.tensor_file import CODES, StoredTensor, TensorFile, tensor_bytes
from erasediff.io.user_file import check_regular

TENSOR_FILE = ".safetensors"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex. UserError for anything but a regular file."""
    check_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_sha256(tensor: StoredTensor) -> str:
    """SHA-256 of a stored tensor, in hex.

    It is taken over the line ``F32 [320, 4, 3, 3]`` of safetensors' dtype and the shape, in ASCII with a line feed, and
    then over the elements, little-endian in row-major order as the file holds them: so it does not depend on where in
    which file the tensor lies.
    """
    digest = hashlib.sha256(f"{CODES[tensor.dtype]} {list(tensor.shape)}\n".encode())
    digest.update(tensor_bytes(tensor.load()))
    return digest.hexdigest()


def describe_files(files: Iterable[tuple[str, Path]]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file, and those of the tensors in safetensors files.

    One tensor per thread is read at a time; hashlib works without the interpreter's lock.

    Args:
        files: Names for the description, and paths.

    Returns:
        By name: ``{"bytes": ..., "sha256": ...}``, with ``"tensors": {name: SHA-256}`` for a safetensors file, which is
        None for one whose header cannot be read.

    Raises:
        UserError: A file is none that can be read.
    """
    found: dict[str, dict[str, Any]] = {}
    work: list[tuple[int, dict[str, Any], str, Path | StoredTensor]] = []
    for name, path in files:
        check_regular(path)
        record = found[name] = {"bytes": path.stat().st_size, "sha256": ""}
        work.append((record["bytes"], record, "sha256", path))
        if path.suffix != TENSOR_FILE:
            continue
        try:
            tensors = TensorFile.open(path).tensors
        except UserError:
            record["tensors"] = None
            continue
        record["tensors"] = {}
        work += [(tensor.nbytes, record["tensors"], key, tensor) for key, tensor in sorted(tensors.items())]
        # Keys in their order, whichever thread is done first.
        record["tensors"] |= dict.fromkeys(sorted(tensors), "")

    def digest(item: tuple[int, dict[str, Any], str, Path | StoredTensor]) -> None:
        _, record, key, source = item
        record[key] = tensor_sha256(source) if isinstance(source, StoredTensor) else file_sha256(source)

    # The largest first, so that no thread begins a whole file when the others are done.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(digest, sorted(work, key=lambda item: -item[0])))
    return found

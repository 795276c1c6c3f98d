"""CIFAR-10 and CIFAR-100 in their authors' archives, binary or Python version."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from erasediff.data.sources.base import ImageSet, ReadOptions
from erasediff.data.sources.pixel_arrays import array_images
from erasediff.errors import UserError, reason
from erasediff.io.user_file import MEGABYTE, read_bytes, read_text

SIDE = 32
BYTES = 3 * SIDE * SIDE
LARGEST_PICKLE = 1000 * MEGABYTE
TRAIN, TEST = "train", "test"
BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
FOLDERS = ("", "cifar-10-batches-bin", "cifar-10-batches-py", "cifar-100-binary", "cifar-100-python")
"""Where the archives unpack to, and torchvision looks, below the folder that is given."""


class CifarSource:
    """The folder of a CIFAR archive (Krizhevsky 2009), or the one above it, as for torchvision's ``root``."""

    has_captions = False

    def reads(self, location: str) -> bool:
        return _variant(Path(location)) is not None

    def read(self, location: str, options: ReadOptions) -> ImageSet:
        found = _variant(Path(location))
        assert found is not None
        folder, read = found
        if options.split not in (TRAIN, TEST):
            raise UserError(f"CIFAR in {folder} has no split {options.split!r}: choose from {TRAIN}, {TEST}.")
        parts, names = read(folder, options.split)
        arrays = _Joined([images for images, _ in parts])
        return array_images(location, arrays, [int(label) for _, labels in parts for label in labels], names)


class _Joined(Sequence[Any]):
    """Images [3, 32, 32] of several files one after the other, with channels last."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> Any:
        part = int(np.searchsorted(self._ends, index, side="right"))
        first = 0 if part == 0 else int(self._ends[part - 1])
        return self._parts[part][index - first].reshape(3, SIDE, SIDE).transpose(1, 2, 0)


def _variant(root: Path) -> Any:
    """(folder, reader) of the archive in or below ``root``; None if there is none."""
    for folder in (root / name for name in FOLDERS):
        for files, reader in (
            (("data_batch_1.bin", "batches.meta.txt"), _binary_10),
            (("data_batch_1", "batches.meta"), _python_10),
            (("train.bin", "fine_label_names.txt"), _binary_100),
            (("train", "meta"), _python_100),
        ):
            if all((folder / file).is_file() for file in files):
                return folder, reader
    return None


def _binary_10(folder: Path, split: str) -> tuple[list[tuple[Any, Any]], list[str]]:
    files = BATCHES if split == TRAIN else ("test_batch",)
    return [_records(folder / f"{name}.bin", 1) for name in files], _lines(folder / "batches.meta.txt")


def _binary_100(folder: Path, split: str) -> tuple[list[tuple[Any, Any]], list[str]]:
    return [_records(folder / f"{split}.bin", 2)], _lines(folder / "fine_label_names.txt")


def _records(path: Path, labels: int) -> tuple[Any, Any]:
    """(images [N, 3072], labels [N]) of records of ``labels`` label bytes, the last of which counts, and an image."""
    try:
        size = path.stat().st_size
        if size == 0 or size % (labels + BYTES):
            raise UserError(f"{path} is no CIFAR file: it does not consist of records of {labels + BYTES} bytes.")
        records = np.memmap(path, np.uint8, "r").reshape(-1, labels + BYTES)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from None
    return records[:, labels:], records[:, labels - 1]


def _lines(path: Path) -> list[str]:
    try:
        return read_text(path).split()
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from None


def _python_10(folder: Path, split: str) -> tuple[list[tuple[Any, Any]], list[str]]:
    parts = [_unpickled(folder / name) for name in (BATCHES if split == TRAIN else ("test_batch",))]
    return [_part(folder, part, "labels") for part in parts], _names(folder / "batches.meta", "label_names")


def _python_100(folder: Path, split: str) -> tuple[list[tuple[Any, Any]], list[str]]:
    part = _part(folder, _unpickled(folder / split), "fine_labels")
    return [part], _names(folder / "meta", "fine_label_names")


def _part(folder: Path, content: dict[Any, Any], labels: str) -> tuple[Any, Any]:
    images: Any = content.get(b"data")
    numbers = content.get(labels.encode())
    is_sound = isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape[1:] == (BYTES,)
    if not is_sound or not isinstance(numbers, list) or len(numbers) != len(images):
        raise UserError(f"The files in {folder} are not those of CIFAR: unpack the archive again.")
    return images, numbers


def _names(path: Path, key: str) -> list[str]:
    names = _unpickled(path).get(key.encode())
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise UserError(f"{path} has no {key}: unpack the archive again.")
    return [name.decode() for name in names]


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler of containers, numbers, text and NumPy arrays, which no pickle can make run code."""

    ALLOWED = frozenset(
        {
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no array")
        # By its own name: NumPy 2 warns of ``numpy.core``.
        return super().find_class(
            module.replace("numpy.core", "numpy._core") if np.__version__ >= "2" else module, name
        )


def _unpickled(path: Path) -> dict[Any, Any]:
    try:
        content = _ArrayUnpickler(io.BytesIO(read_bytes(path, LARGEST_PICKLE)), encoding="bytes").load()
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from None
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is no file of CIFAR: {reason(error)}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no file of CIFAR: it holds a {type(content).__name__}.")
    return content


SOURCE = CifarSource()

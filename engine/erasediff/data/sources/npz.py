"""NumPy archives (.npz) of images and labels."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from erasediff.data.sources.base import ImageSet, ReadOptions
from erasediff.data.sources.pixel_arrays import array_images
from erasediff.errors import UserError, reason
from erasediff.io.user_file import check_regular

DAMAGE = (zlib.error, NotImplementedError, RuntimeError, SyntaxError, TokenError)
"""Of a member: its bits, its compression, a password; the header of an array is a text in Python's syntax."""
IMAGES, LABELS, NAMES = ("images", "arr_0"), ("labels", "arr_1"), "class_names"
LOCAL_HEADER = 30
"""Bytes of a zip member's local header before its name and extra field, whose lengths are at bytes 26 and 28."""


class NpzSource:
    """An .npz file: ``images`` (or ``arr_0``) uint8 [N, H, W], [N, H, W, C] or [N, C, H, W], C 1 or 3; ``labels`` (or
    ``arr_1``) integers [N], if any; ``class_names``, if any. With the split in front, such as ``test_images``, these
    come first. Nothing is unpickled; arrays that are not compressed are mapped, not loaded."""

    has_captions = False

    def reads(self, location: str) -> bool:
        return location.lower().endswith(".npz")

    def read(self, location: str, options: ReadOptions) -> ImageSet:
        path = Path(location)
        check_regular(path)
        try:
            with np.load(path, allow_pickle=False) as archive:
                names = archive.files
                images = _array(path, archive, _first(names, IMAGES, options.split))
                labels = _array(path, archive, _first(names, LABELS, options.split))
                class_names = [str(name) for name in archive[NAMES]] if NAMES in names else []
        except FileNotFoundError:
            raise UserError(f"There is no file {path}.") from None
        except (OSError, ValueError, zipfile.BadZipFile, EOFError, *DAMAGE) as error:
            raise UserError(f"{path} cannot be read as an .npz of plain arrays: {reason(error)}.") from None
        if images is None:
            raise UserError(f"{path} has no array {' or '.join(IMAGES)}: it has {', '.join(names) or 'none'}.")
        if labels is not None and (labels.size != len(images) or labels.dtype.kind not in "iu"):
            raise UserError(f"The labels in {path} are no list of whole numbers, one for each of {len(images)} images.")
        return array_images(
            location,
            _channels_last(path, images),
            None if labels is None else labels.reshape(-1).tolist(),
            class_names,
        )


def _first(names: list[str], wanted: tuple[str, ...], split: str) -> str | None:
    return next((name for name in (f"{split}_{wanted[0]}", *wanted) if name in names), None)


def _array(path: Path, archive: Any, name: str | None) -> Any:
    """The array called ``name``, mapped if it is stored as it is; None for None."""
    if name is None:
        return None
    member = archive.zip.getinfo(f"{name}.npy")
    if member.compress_type != zipfile.ZIP_STORED:
        return archive[name]
    with path.open("rb") as file:
        file.seek(member.header_offset)
        header = file.read(LOCAL_HEADER)
        lengths = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
        file.seek(member.header_offset + LOCAL_HEADER + sum(lengths))
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read_header(file)
        if dtype.hasobject or 0 in shape:
            return archive[name]
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if is_fortran else "C")


def _channels_last(path: Path, images: Any) -> Any:
    """``images`` as [N, H, W] or [N, H, W, C]. UserError for another shape or dtype."""
    shape = images.shape
    if images.dtype != np.uint8 or len(shape) not in (3, 4):
        raise UserError(f"The images in {path} are {images.dtype} {list(shape)}: store uint8 [N, H, W, 3], 0 to 255.")
    if len(shape) == 3 or shape[3] in (1, 3):
        return images
    if shape[1] in (1, 3):
        return images.transpose(0, 2, 3, 1)
    raise UserError(f"The images in {path} have neither 1 nor 3 channels: their shape is {list(shape)}.")


SOURCE = NpzSource()

"""STL-10 in its authors' binary archive."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from erasediff.data.sources.base import ImageSet, ReadOptions
from erasediff.data.sources.pixel_arrays import array_images
from erasediff.errors import UserError, reason
from erasediff.io.user_file import read_text

SIDE = 96
BYTES = 3 * SIDE * SIDE
SPLITS = ("train", "test", "unlabeled")


class Stl10Source:
    """The folder stl10_binary (Coates et al. 2011), or the one above it, as for torchvision's ``root``."""

    has_captions = False

    def reads(self, location: str) -> bool:
        return _folder(Path(location)) is not None

    def read(self, location: str, options: ReadOptions) -> ImageSet:
        folder = _folder(Path(location))
        assert folder is not None
        if options.split not in SPLITS:
            raise UserError(f"STL-10 in {folder} has no split {options.split!r}: choose from {', '.join(SPLITS)}.")
        try:
            stored = np.memmap(folder / f"{options.split}_X.bin", np.uint8, "r")
            if stored.size % BYTES:
                raise UserError(f"{folder / f'{options.split}_X.bin'} is cut short: unpack the archive again.")
            # Column by column, and channels first.
            images = stored.reshape(-1, 3, SIDE, SIDE).transpose(0, 3, 2, 1)
            if options.split == "unlabeled":
                return array_images(location, images, None, ())
            labels = np.fromfile(folder / f"{options.split}_y.bin", np.uint8).astype(np.int64) - 1
            names = read_text(folder / "class_names.txt").split()
        except (OSError, ValueError) as error:
            raise UserError(f"STL-10 in {folder} cannot be read: {reason(error)}.") from None
        return array_images(location, images, labels.tolist(), names)


def _folder(root: Path) -> Path | None:
    folders = (root, root / "stl10_binary")
    return next((f for f in folders if any((f / f"{split}_X.bin").is_file() for split in SPLITS)), None)


SOURCE = Stl10Source()

"""Files of a split of a data set, told by their names as ``datasets`` does."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from erasediff.data.folder_listing import is_hidden
from erasediff.errors import UserError

TRAIN = "train"
SPLITS = {
    "train": TRAIN,
    "training": TRAIN,
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Splits by the words that stand for them."""


def files_in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files in ``folder`` with one of ``suffixes`` in any case, but for hidden ones; none if it is no folder."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return [folder / name for name in names if name.lower().endswith(suffixes) and not is_hidden(name)]


def files_of_split(files: Sequence[Path], split: str, location: str) -> list[Path]:
    """The ``files`` of ``split``, in the order of their paths.

    They are called ``SPLIT-00000-of-00001``, or their names have a word of the split's; files of which none has such a
    word are training data.

    Raises:
        UserError: For no such split, and files of which some belong to a split and others to none.
    """
    pieces = [file for file in files if re.fullmatch(rf"{re.escape(split)}-\d+-of-\d+", file.stem)]
    if pieces:
        return sorted(pieces)
    by_split: defaultdict[str, list[Path]] = defaultdict(list)
    others: list[Path] = []
    for file in sorted(files):
        word = next((word for word in re.split(r"[^a-z]+", file.name.lower()) if word in SPLITS), None)
        (others if word is None else by_split[SPLITS[word]]).append(file)
    if others and by_split:
        raise UserError(
            f"{location} holds {others[0].name}, of no split, beside those of {', '.join(sorted(by_split))}: give the "
            "files themselves, or move it."
        )
    if others:
        by_split[TRAIN] = others
    wanted = SPLITS.get(split, split)
    if wanted not in by_split:
        raise UserError(f"{location} has no split {split!r}: choose from {', '.join(sorted(by_split)) or 'none'}.")
    return by_split[wanted]

"""Webdataset shards: tar files with an image and its description under each key."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from rich.console import Console

from erasediff.data.folder_listing import is_hidden
from erasediff.data.image_folder import CLASS
from erasediff.data.image_formats import readable_suffixes
from erasediff.data.sources import shard_index as index
from erasediff.data.sources.base import ImageSet, ReadOptions
from erasediff.data.sources.descriptions import Descriptions, described_images
from erasediff.data.sources.splits import TRAIN, files_in, files_of_split
from erasediff.data.sources.tar_members import compressed
from erasediff.errors import UserError
from erasediff.io.json_file import parse_json
from erasediff.utils.progress import progress_bar

SHARD = ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
BRACES = re.compile(r"\{([^{}]*)\}")
MOST_SHARDS, OPEN_SHARDS, SCANNED_AT_ONCE, ROWS_AT_ONCE = 100_000, 64, 8, 4096


class WebdatasetSource:
    """Shards of webdataset: a ``.tar``, a folder of them, or ``train-{000000..000012}.tar``.

    A key is a member's name up to its first dot. Each has an image, and, if any, a caption (``.txt``, ``.caption``), a
    class (``.cls``) and metadata (``.json``, an object); its folder in the shard is its class for want of another.
    """

    has_captions = True

    def reads(self, location: str) -> bool:
        return location.lower().endswith((SHARD, *COMPRESSED)) or is_shard_folder(Path(location))

    def read(self, location: str, options: ReadOptions) -> ImageSet:
        shards = _shards(location, options.split)
        tables = _indexed(shards)

        def describe(descriptions: Descriptions) -> Sequence[str]:
            for number, (shard, table) in enumerate(zip(shards, tables, strict=True)):
                _describe(descriptions, number, shard, table)
            return ()

        read, remedy = ShardReader(shards, tables), "give its key a .txt member, or a caption in .json"
        return described_images(location, shards, options, describe, read, remedy)


def _describe(descriptions: Descriptions, number: int, shard: Path, table: pa.Table) -> None:
    """Add the images of a shard."""
    for rows in table.select([index.NAME, index.TEXTS, index.KIND, index.METADATA]).to_batches(ROWS_AT_ONCE):
        for name, texts, kind, metadata in zip(*rows.to_pydict().values(), strict=True):
            given = kind or name.rpartition("/")[0]
            descriptions.append(
                number,
                name,
                {} if metadata is None else _columns(shard, name, metadata),
                place=f"{shard}: {name}",
                texts=texts,
                attributes={CLASS: given} if given else {},
                folder_class=kind is None,
            )


class ShardReader:
    """Reads images of shards, each by one seek and read.

    Args:
        shards: Paths of tar files.
        tables: Their indices; the images of all shards are numbered from 0.
    """

    def __init__(self, shards: Sequence[Path], tables: Sequence[pa.Table]) -> None:
        self._shards = shards
        self._ends = np.cumsum([table.num_rows for table in tables])
        self._offsets = _joined(tables, index.OFFSET)
        self._sizes = _joined(tables, index.SIZE)
        # Not closed here: a thread may still be reading it.
        self._opened = lru_cache(OPEN_SHARDS)(self._open)

    def __call__(self, number: int) -> bytes:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        size = int(self._sizes[number])
        file = self._opened(shard)
        content = os.pread(file.fileno(), size, int(self._offsets[number]))
        if len(content) != size:
            raise UserError(f"The shard {self._shards[shard]} changed while it was being read: run the command again.")
        return content

    def _open(self, shard: int) -> BinaryIO:
        return self._shards[shard].open("rb", buffering=0)


def _joined(tables: Sequence[pa.Table], column: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.concatenate([table.column(column).to_numpy() for table in tables])


def is_shard_folder(folder: Path) -> bool:
    """Whether a folder holds tar files, and neither it nor its subfolders hold images, among which they would lie."""
    if not files_in(folder, (SHARD, *COMPRESSED)):
        return False
    folders = [folder, *(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))]
    return not any(files_in(parent, tuple(readable_suffixes())) for parent in folders)


def _shards(location: str, split: str) -> list[Path]:
    """Paths of the shards that ``location`` names. UserError for one that is not there or is compressed."""
    if "://" in location or location.startswith("pipe:"):
        raise UserError(f"{location} is not here, and nothing is downloaded: give the path of a copy.")
    folder = Path(location)
    if folder.is_dir():
        shards = files_of_split(files_in(folder, (SHARD, *COMPRESSED)), split, location)
    else:
        shards = [folder] if folder.is_file() else [Path(name) for name in expand_braces(location)]
        if split != TRAIN:
            shards = files_of_split(shards, split, location)
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        others = f", and {len(missing) - 1} more of {len(shards)} are missing" if len(missing) > 1 else ""
        raise UserError(f"There is no shard {missing[0]}{others}: check the path.")
    for shard in shards:
        if shard.name.lower().endswith(COMPRESSED):
            raise UserError(compressed(shard, shard.suffix))
    twice = [shard for shard, other in itertools.pairwise(sorted(shards)) if shard == other]
    if twice:
        raise UserError(f"{location} names {twice[0]} twice: name it once.")
    return shards


def expand_braces(pattern: str) -> list[str]:
    """Names of a pattern with ranges ``{000..012}`` and lists ``{a,b}``, in their order.

    Raises:
        UserError: For braces of another kind, and more than 100,000 names.
    """
    literals = BRACES.split(pattern)
    choices: list[Sequence[str]] = []
    for number, text in enumerate(literals):
        if number % 2 == 0:
            choices.append((text,))
        elif match := RANGE.fullmatch(text):
            first, last = (int(end) for end in match.groups())
            if last < first or last - first >= MOST_SHARDS:
                raise UserError(f"{pattern}: {{{text}}} is no range of at most {MOST_SHARDS:,} shards, first to last.")
            choices.append([f"{one:0{len(match[1])}d}" for one in range(first, last + 1)])
        elif "," in text:
            choices.append(text.split(","))
        else:
            raise UserError(f"{pattern}: {{{text}}} is neither a range, {{000..012}}, nor a list, {{a,b}}.")
    if np.prod([float(len(choice)) for choice in choices]) > MOST_SHARDS:
        raise UserError(f"{pattern} stands for more than {MOST_SHARDS:,} shards: give fewer at a time.")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _indexed(shards: Sequence[Path]) -> list[pa.Table]:
    tables = []
    # Of use where someone looks: the lists of images are made before a command's own output begins.
    console = Console(stderr=True, quiet=not sys.stderr.isatty())
    with progress_bar(console, "Indexing shards", len(shards)) as bar, ThreadPoolExecutor(SCANNED_AT_ONCE) as pool:
        for table in pool.map(index.shard_index, shards):
            tables.append(table)
            bar.advance()
    return tables


def _columns(shard: Path, name: str, metadata: str) -> dict[str, object]:
    """The metadata of an image. UserError for text that is no JSON object."""
    try:
        columns = parse_json(metadata)
    except ValueError as error:
        raise UserError(f"{shard}: the .json of {name} cannot be read: {error}.") from None
    if not isinstance(columns, dict):
        raise UserError(f'{shard}: the .json of {name} is not an object such as {{"text": ...}}.')
    return columns


SOURCE = WebdatasetSource()

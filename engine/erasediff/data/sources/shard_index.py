"""Index of a webdataset shard: the image of each key, where it is, and the small members beside it."""

from __future__ import annotations

import os
from collections import defaultdict
from enum import Enum
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from erasediff.data.folder_listing import CAPTION_SUFFIXES, is_hidden
from erasediff.data.image_formats import conversion_advice, readable_suffixes, unreadable_suffixes
from erasediff.data.sources.table_cache import cached_table
from erasediff.data.sources.tar_members import Member, TarScan
from erasediff.errors import UserError
from erasediff.io.user_file import check_regular

FORMAT = 1
NAME, OFFSET, SIZE, TEXTS, KIND, METADATA = "name", "offset", "size", "texts", "class", "metadata"
SCHEMA = pa.schema(
    {
        NAME: pa.large_string(),
        OFFSET: pa.int64(),
        SIZE: pa.int64(),
        TEXTS: pa.large_list(pa.large_string()),
        KIND: pa.large_string(),
        METADATA: pa.large_string(),
    }
)
"""Columns of an index: name of the image's member, its offset and size in bytes, captions in text members, content of
the ``.cls`` member and of the ``.json`` member, null for want of one."""
CLASS_SUFFIX, METADATA_SUFFIX = ".cls", ".json"
LARGEST_TEXT = 2**24
"""Bytes of a caption, class or metadata beyond which it cannot be one."""


def shard_index(shard: Path) -> pa.Table:
    """Index of ``shard``, from the cache if the shard has the path, size and time it had when it was scanned.

    Raises:
        UserError: As ``TarScan.members``; for a key without an image, with two, or with a member twice, and texts that
            are not UTF-8.
    """
    return cached_table("shards", [shard], [FORMAT, sorted(readable_suffixes())], lambda: _scanned(shard))


def _scanned(shard: Path) -> pa.Table:
    try:
        check_regular(shard)
        with shard.open("rb", buffering=0) as file:
            descriptor = file.fileno()
            size = os.fstat(descriptor).st_size
            return _indexed(shard, TarScan(shard, lambda start, count: os.pread(descriptor, count, start), size))
    except OSError as error:
        raise UserError(f"Cannot read the shard {shard}: {error.strerror or error}.") from None


class _Role(Enum):
    """What a member is to its key, by its suffix: all of its name from the first dot on."""

    IMAGE, UNREADABLE, CAPTION, CLASS, METADATA, OTHER = range(6)


@cache
def _role(suffix: str) -> _Role:
    stem, kind = os.path.splitext(f"a{suffix}")
    if kind in readable_suffixes():
        return _Role.IMAGE
    if kind in unreadable_suffixes():
        return _Role.UNREADABLE
    # The caption of the key, .txt, or of the image, .jpg.txt.
    if kind in CAPTION_SUFFIXES and (stem == "a" or stem[1:] in readable_suffixes()):
        return _Role.CAPTION
    return {CLASS_SUFFIX: _Role.CLASS, METADATA_SUFFIX: _Role.METADATA}.get(suffix, _Role.OTHER)


TEXT_ROLES = (_Role.CAPTION, _Role.CLASS, _Role.METADATA)


class _KeyMember(NamedTuple):
    """A member of a key, with its content if it is a text."""

    suffix: str
    role: _Role
    member: Member
    content: bytes


def _indexed(shard: Path, scan: TarScan) -> pa.Table:
    keys: defaultdict[str, list[_KeyMember]] = defaultdict(list)
    hidden_folder = cache(_is_hidden_folder)
    for member in scan.members():
        folder, slash, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not stem or is_hidden(name) or hidden_folder(folder) or (name.startswith("__") and name.endswith("__")):
            continue
        suffix = f"{dot}{extension}".lower()
        role, content = _role(suffix), b""
        if role in TEXT_ROLES:
            if member.size > LARGEST_TEXT:
                raise UserError(f"{shard}: {member.name} is too large for a caption, a class or metadata.")
            content = scan.content(member)
        keys[f"{folder}{slash}{stem}"].append(_KeyMember(suffix, role, member, content))
    rows = [_row(shard, key, members) for key, members in keys.items()]
    columns = zip(*rows, strict=True) if rows else ([] for _ in SCHEMA)
    arrays = [pa.array(column, kind) for column, kind in zip(columns, SCHEMA.types, strict=True)]
    return pa.table(arrays, schema=SCHEMA)


def _is_hidden_folder(folder: str) -> bool:
    return folder != "" and any(map(is_hidden, folder.split("/")))


def _row(shard: Path, key: str, members: list[_KeyMember]) -> tuple[object, ...]:
    """A row of ``SCHEMA``."""
    image = _image(shard, key, members)
    texts: dict[_Role, list[str]] = {role: [] for role in TEXT_ROLES}
    for _, role, member, content in members if len(members) < 3 else sorted(members, key=_caption_order):
        if role in texts:
            try:
                text = content.decode("utf-8-sig").strip()
            except UnicodeDecodeError:
                raise UserError(f"{shard}: {member.name} is not UTF-8 text: save it in that encoding.") from None
            if text:
                texts[role].append(text)
    captions, kinds, metadata = texts.values()
    return (
        image.name,
        image.offset,
        image.size,
        captions,
        kinds[0] if kinds else None,
        metadata[0] if metadata else None,
    )


def _caption_order(member: _KeyMember) -> tuple[bool, int]:
    """Captions in .txt before those in .caption, and .txt before .jpg.txt, as beside the files of a folder."""
    return not member.suffix.endswith(CAPTION_SUFFIXES[0]), len(member.suffix)


def _image(shard: Path, key: str, members: list[_KeyMember]) -> Member:
    """The one image of a key. UserError for none, several, one that cannot be read, a member twice."""
    if len({one.suffix for one in members}) < len(members):
        suffixes = [one.suffix for one in members]
        twice = next(one.member for one in members if suffixes.count(one.suffix) > 1)
        raise UserError(
            f"{shard}: the key {key} (the names up to the first dot) has the member {twice.name} twice: pack the shard "
            "again, under names of their own."
        )
    images = [one.member for one in members if one.role is _Role.IMAGE]
    unreadable = next((one.member for one in members if one.role is _Role.UNREADABLE), None)
    if unreadable is not None:
        advice = conversion_advice(os.path.splitext(unreadable.name)[1].lower())
        raise UserError(f"{shard}: {unreadable.name} cannot be read as an image here: {advice}.")
    if len(images) > 1:
        names = " and ".join(image.name for image in images[:2])
        raise UserError(
            f"{shard}: the key {key} (the names up to the first dot) has several images, {names}: keep one for each."
        )
    if not images:
        others = ", ".join(one.member.name for one in members)
        raise UserError(
            f"{shard}: the key {key} has no image, only {others}: add one, with a suffix such as .png or .jpg, or "
            "remove it."
        )
    return images[0]

"""Listing of image folders: each real folder and file once, nothing that looks like an image left out silently."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from erasediff.data.image_formats import conversion_advice, holds_image, readable_suffixes, unreadable_suffixes
from erasediff.data.path_index import near
from erasediff.errors import UserError

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
UNREAD_METADATA = "metadata.parquet"
CAPTION_SUFFIXES = (".txt", ".caption")
SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information"})
SHOWN = 3


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file of a folder.

    Attributes:
        path: in the folder.
        identity: device and inode, equal for all names of one file.
        is_link: whether the path is a symbolic link.
    """

    path: Path
    identity: tuple[int, int]
    is_link: bool


@dataclass(frozen=True, slots=True)
class FolderListing:
    """Files of a folder and its subfolders, without hidden ones and those of operating systems.

    Attributes:
        images: in the order of their paths.
        tables: metadata files.
        texts: caption files, by folder and name without suffix.
    """

    images: list[ImageFile] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    texts: defaultdict[tuple[str, str], list[Path]] = field(default_factory=lambda: defaultdict(list))

    def texts_beside(self, image: Path) -> list[Path]:
        """Caption files of ``image``, ``a.txt`` before ``a.caption`` and ``a.jpg.txt`` for ``a.jpg``.

        Case and Unicode form of the names may differ. A file may serve several images.
        """
        if not self.texts:
            return []
        folder = os.path.dirname(image)
        stems = dict.fromkeys((_key(image.stem), _key(image.name)))
        texts = [text for stem in stems for text in self.texts.get((folder, stem), ())]
        return sorted(texts, key=lambda text: CAPTION_SUFFIXES.index(text.suffix.lower()))


def list_folder(folder: Path) -> FolderListing:
    """List ``folder`` and its subfolders, through symbolic links, each real folder once.

    A folder that is reached on several ways has the path without a link, or the first.

    Raises:
        UserError: for no folder, no images in it, a subfolder that cannot be listed, and files that look like images
            but cannot be read.
    """
    if not folder.is_dir():
        raise UserError(missing_folder(folder))
    listing = FolderListing()
    unreadable: list[tuple[Path, str]] = []
    seen: set[tuple[int, int]] = set()
    linked = [folder]
    while linked:
        pending = [linked.pop(0)]
        while pending:
            parent = pending.pop()
            try:
                status = parent.stat()
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(parent) as found:
                    entries = sorted(found, key=lambda entry: entry.name)
            except OSError as error:
                raise UserError(f"Cannot list the folder {parent}: {error.strerror}.") from error
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                if _is_folder(entry):
                    (linked if entry.is_symlink() else pending).append(parent / entry.name)
                else:
                    _add(listing, unreadable, parent, entry, status.st_dev)
    if unreadable:
        raise UserError(_refusal(unreadable))
    if not listing.images:
        raise UserError(f"There are no images in {folder}: it needs files such as {_listed(readable_suffixes())}.")
    listing.images.sort(key=lambda image: image.path)
    return listing


def missing_folder(folder: Path) -> str:
    """The sentence that there is no such folder, with those of similar names beside it."""
    if folder.is_file():
        return f"{folder} is a file, not a folder: give the folder that holds it."
    parent = next((parent for parent in folder.parents if parent.is_dir()), Path())
    wanted = folder.relative_to(parent).parts[0] if folder.is_relative_to(parent) else folder.name
    try:
        folders = [path.name for path in parent.iterdir() if path.is_dir()]
    except OSError:
        folders = []
    beside = [str(parent / name) for name in near(wanted, folders)]
    advice = (
        f"did you mean {' or '.join(beside)}?" if beside else "check the path; a data set of the hub is owner/name."
    )
    return f"There is no folder {folder}: {advice}"


def is_hidden(name: str) -> bool:
    """Return true for a name that no listing shows: dot files, ``._`` files of macOS, folders of a system's own."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link that leads to itself.
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _add(
    listing: FolderListing, unreadable: list[tuple[Path, str]], parent: Path, entry: os.DirEntry[str], device: int
) -> None:
    path = parent / entry.name
    suffix = path.suffix.lower()
    if entry.name in METADATA_FILES:
        listing.tables.append(path)
    elif entry.name == UNREAD_METADATA:
        unreadable.append((path, "is metadata in a format that is not read: save it as metadata.jsonl or metadata.csv"))
    elif suffix in CAPTION_SUFFIXES:
        listing.texts[str(parent), _key(path.stem)].append(path)
    elif suffix in unreadable_suffixes():
        unreadable.append((path, f"cannot be read as an image here: {conversion_advice(suffix)}"))
    elif suffix in readable_suffixes() and not _is_file(entry):
        unreadable.append((path, "is no file: restore what the link leads to, or remove it"))
    elif suffix in readable_suffixes() or (_is_file(entry) and holds_image(path)):
        if entry.is_symlink():
            target = entry.stat()
            listing.images.append(ImageFile(path, (target.st_dev, target.st_ino), True))
        else:
            listing.images.append(ImageFile(path, (device, entry.inode()), False))


def _refusal(unreadable: list[tuple[Path, str]]) -> str:
    reason = unreadable[0][1]
    alike = [str(path) for path, other in unreadable if other == reason]
    others = f" and {len(alike) - SHOWN} more" if len(alike) > SHOWN else ""
    return f"{', '.join(alike[:SHOWN])}{others} {reason}."


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))

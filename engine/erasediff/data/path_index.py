"""Look-up of images by paths as people write them: absolute or in part, in any Unicode form, with either slash."""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePath
from typing import Generic, TypeVar

T = TypeVar("T")
MANY = 20_000


class PathIndex(Generic[T]):
    """Items by the paths of their files.

    Args:
        items: path and item; an item may have several paths.
    """

    def __init__(self, items: Iterable[tuple[Path, T]]) -> None:
        self._items = [(path, item) for path, item in items]

    def at(self, path: str) -> T | None:
        """The item whose file is at ``path``, relative to the working folder or absolute, through any links."""
        if not path or "\0" in path:
            return None
        absolute = os.path.abspath(path)
        found = self._by_path.get(absolute, self._by_path.get(name_form(absolute)))
        if found is not None:
            return found
        real = os.path.realpath(path)
        return self._by_real_path.get(name_form(real)) if os.path.exists(real) else None

    def ending_with(self, path: str) -> list[T]:
        """The items with a path that ends with the whole names of ``path``."""
        parts = tuple(name_form(part) for part in PurePath(os.path.normpath(path)).parts)
        if not path or not parts:
            return []
        candidates = self._by_name.get(parts[-1], ()) if len(parts) == 1 else self._by_last_two.get(parts[-2:], ())
        return [item for other, item in candidates if _absolute_parts(other)[-len(parts) :] == parts]

    def in_folder(self, path: str) -> int:
        """Number of paths below a folder that ends with the whole names of ``path``."""
        parts = tuple(name_form(part) for part in PurePath(os.path.normpath(path)).parts)
        return sum(
            any(folder[end - len(parts) : end] == parts for end in range(len(parts), len(folder) + 1))
            for folder in (_absolute_parts(other)[:-1] for other, _ in self._items)
        )

    def near(self, path: str) -> list[str]:
        """Paths with names that resemble that of ``path``."""
        by_name = {other.name: str(other) for other, _ in self._items}
        return [by_name[name] for name in near(PurePath(path).name, list(by_name))]

    @cached_property
    def _by_path(self) -> dict[str, T]:
        absolute = [(os.path.abspath(path), item) for path, item in self._items]
        # Exact names last: a folder may hold two that differ in their Unicode form alone.
        return {name_form(path): item for path, item in absolute} | dict(absolute)

    @cached_property
    def _by_real_path(self) -> dict[str, T]:
        parents: dict[str, str] = {}
        found = {}
        for path, item in self._items:
            parent = str(path.parent)
            if parent not in parents:
                parents[parent] = name_form(os.path.realpath(parent))
            found[f"{parents[parent]}/{name_form(path.name)}"] = item
        return found

    @cached_property
    def _by_name(self) -> dict[str, list[tuple[Path, T]]]:
        found = defaultdict(list)
        for path, item in self._items:
            found[name_form(path.name)].append((path, item))
        return dict(found)

    @cached_property
    def _by_last_two(self) -> dict[tuple[str, ...], list[tuple[Path, T]]]:
        found = defaultdict(list)
        for path, item in self._items:
            found[_absolute_parts(path)[-2:]].append((path, item))
        return dict(found)


def spellings(text: str) -> Iterator[str]:
    """``text`` as a path: as it stands, without spaces and quotes around it, and with slashes for backslashes."""
    stripped = text.strip()
    quoted = len(stripped) > 1 and stripped[0] == stripped[-1] and stripped[0] in "\"'"
    plain = [text, stripped, *([stripped[1:-1]] if quoted else [])]
    yield from dict.fromkeys([*plain, *(path.replace("\\", "/") for path in plain)])


def near(word: str, choices: Sequence[str]) -> list[str]:
    """Up to three ``choices`` that resemble ``word``, those that differ in case alone first."""
    folded = name_form(word).casefold()
    same = [choice for choice in choices if name_form(choice).casefold() == folded]
    # Comparing with each of a million names would take minutes.
    return same[:3] or (difflib.get_close_matches(word, choices) if len(choices) <= MANY else [])


def name_form(text: str) -> str:
    """A name as names are compared: in one Unicode form."""
    return unicodedata.normalize("NFC", text)


def _absolute_parts(path: Path) -> tuple[str, ...]:
    return tuple(name_form(part) for part in PurePath(os.path.abspath(path)).parts)

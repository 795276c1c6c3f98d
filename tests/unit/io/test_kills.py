"""Folders and files that are replaced or removed, by a process that is killed at each call that changes the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from crash_points import Case, contents, kill_at_each_call

from erasediff.io.atomic import remove_abandoned

OLD = {"inner/a": b"old a", "inner/c": b"old c"}
NEW = {"inner/a": b"new a", "inner/b": b"new b"}


def old_folder(place: Path) -> None:
    for name, content in OLD.items():
        (place / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "model" / name).write_bytes(content)


def old_or_new(killed: Path, _whole: Path) -> None:
    remove_abandoned(killed)
    assert contents(killed / "model") in (OLD, NEW)


def old_or_absent(killed: Path, _whole: Path) -> None:
    assert contents(killed / "model") in (OLD, {})


def old_or_new_file(killed: Path, _whole: Path) -> None:
    assert (killed / "file").read_text() in ("old", "new")


CASES = [
    Case("new folder", lambda place: ["crash_cases:replace_folder", str(place / "model")]),
    Case(
        "folder",
        lambda place: ["crash_cases:replace_folder", str(place / "model")],
        check=old_or_new,
        prepare=old_folder,
    ),
    Case(
        "removed folder",
        lambda place: ["crash_cases:remove_folder", str(place / "model")],
        check=old_or_absent,
        prepare=old_folder,
    ),
    Case(
        "file",
        lambda place: ["crash_cases:replace_file", str(place / "file")],
        check=old_or_new_file,
        prepare=lambda place: (place / "file").write_text("old") and None,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_kill_leaves_the_old_or_the_new(case: Case, tmp_path: Path) -> None:
    kills = kill_at_each_call(case, tmp_path)
    assert kills.total() > 3

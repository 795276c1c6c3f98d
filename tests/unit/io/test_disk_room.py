"""A disk without room, and a place that cannot be written, are told in numbers and names."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from erasediff.errors import UserError
from erasediff.io.disk_room import check_file, check_folder, check_room, check_writable


def test_room_is_counted_on_the_disk_of_the_nearest_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=3_000_000_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    check_room(tmp_path / "not/yet", 3_000_000_000, "The model")
    with pytest.raises(UserError, match=r"The model need about 3\.5 GB, but the disk of .*not/yet has 3\.0 GB free"):
        check_room(tmp_path / "not/yet", 3_500_000_000, "The model")
    assert set(asked) == {tmp_path}


def test_a_file_is_no_place_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new/run")
    check_writable(tmp_path)
    with pytest.raises(UserError, match=r"Cannot write .*file/run: not a directory"):
        check_writable(tmp_path / "file/run")


def test_what_is_no_folder_or_no_file_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_folder(tmp_path / "new/run")
    check_file(tmp_path / "new/results.jsonl")
    check_file(tmp_path / "file")
    for place in (tmp_path / "file", Path("/dev/full")):
        with pytest.raises(UserError, match="is no folder that results can be written to"):
            check_folder(place)
    for place in (tmp_path, Path("/dev/full")):
        with pytest.raises(UserError, match="is no file that results can be written to"):
            check_file(place)


def test_a_folder_of_others_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match=r"Cannot write .*run: permission denied"):
        check_writable(tmp_path / "run")

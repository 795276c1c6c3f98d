"""Lines of a deletion request find the image that a person means, or are refused by name."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from erasediff.data.forget_split import forget_files
from erasediff.data.image_folder import CaptionedImage, read_captioned_images
from erasediff.errors import UserError

NAMES = ("#1.png", "bags/a.png", "shoes/a b.png", "shoes/a.png", "shoes/é.png")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for number, name in enumerate(NAMES):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), (number, 0, 0)).save(path)
    monkeypatch.chdir(tmp_path)
    return Path("data")


def forgotten(images: list[CaptionedImage], *lines: str) -> list[str]:
    Path("request.txt").write_bytes("\r\n".join(lines).encode())
    forget, retain = forget_files(images, Path("request.txt"))
    assert len(forget) + len(retain) == len(images)
    return [image.path.relative_to("data").as_posix() for image in forget]


@pytest.fixture
def images(folder: Path) -> list[CaptionedImage]:
    return read_captioned_images(folder, template="x")


@pytest.mark.parametrize(
    "line",
    [
        "shoes/a.png",
        "./shoes/a.png",
        "data/shoes/a.png",
        "shoes/../shoes/a.png",
        "shoes\\a.png",
        "  shoes/a.png\t",
        '"shoes/a.png"',
        "'data/shoes/a.png'",
        "{absolute}/shoes/a.png",
        "{link}/shoes/a.png",
        "\ufeffshoes/a.png",
    ],
)
def test_ways_to_write_a_path(images: list[CaptionedImage], folder: Path, tmp_path: Path, line: str) -> None:
    (tmp_path / "link").symlink_to(folder.resolve())
    line = line.format(absolute=folder.resolve(), link=tmp_path / "link")
    assert forgotten(images, line) == ["shoes/a.png"]


def test_a_root_behind_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder.resolve())
    images = read_captioned_images(Path("link"), template="x")
    Path("request.txt").write_text(f"{(folder / 'shoes/a.png').resolve()}\n")
    assert [image.path.as_posix() for image in forget_files(images, Path("request.txt")).forget] == ["link/shoes/a.png"]


def test_comments_blank_lines_repetitions_and_names_that_begin_with_a_hash(images: list[CaptionedImage]) -> None:
    lines = ("# ticket 7", "", "a b.png", "shoes/a b.png", "#1.png", "# shoes/a.png")
    assert forgotten(images, *lines) == ["#1.png", "shoes/a b.png"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_unicode_forms(images: list[CaptionedImage], form: str) -> None:
    assert forgotten(images, unicodedata.normalize(form, "é.png")) == ["shoes/é.png"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a.png", r"a\.png may be any of 2 images; write more of its path"),
        ("shoes/A.PNG", r"shoes/A\.PNG is no image of the data \(did you mean data/.*/a\.png\?\)"),
        ("s/a.png", r"s/a\.png is no image of the data"),
        ("shoes", r"shoes is a folder of 3 images; list its files"),
        ("data/shoes/", r"data/shoes/ is a folder of 3 images"),
        ("*.png", r"\*\.png is no image of the data"),
        ("/elsewhere/shoes/a.png", r"/elsewhere/shoes/a\.png is no image of the data"),
    ],
)
def test_a_line_of_no_image_is_named(images: list[CaptionedImage], line: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"request\.txt: {said}"):
        forgotten(images, "shoes/a.png", line)


def test_which_line_selected_an_image_is_kept(images: list[CaptionedImage]) -> None:
    Path("request.txt").write_text("shoes/a.png\ndata/shoes/a.png\n")
    assert forget_files(images, Path("request.txt")).forget[0].selected_by == (
        ("file", "shoes/a.png"),
        ("file", "data/shoes/a.png"),
    )

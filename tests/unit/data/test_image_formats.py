"""Pictures are decoded by the formats that are named, whatever a file is called, and other images are named."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile

from erasediff.data import image_formats
from erasediff.data.image_folder import read_captioned_images
from erasediff.data.preprocessing import BrokenImage, open_picture, picture_size
from erasediff.errors import UserError

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n0 0 40 40 rectfill\nshowpage\n"
HEIC_HEAD = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


@pytest.fixture
def fresh_formats():
    """The formats are asked for again, before and after the test."""
    cached = (image_formats.readable_formats, image_formats.readable_suffixes, image_formats.unreadable_suffixes)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def heif_plugin(monkeypatch: pytest.MonkeyPatch, fresh_formats: None) -> None:
    """A stand-in for ``pillow_heif`` that shows a red pixel for any HEIC file."""

    class HeifFile(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self._mode, self._size, self.tile = "RGB", (1, 1), []

        def load(self):
            self.im = Image.new("RGB", (1, 1), "red").im
            return None

    def register_heif_opener() -> None:
        monkeypatch.setitem(Image.OPEN, "HEIF", (HeifFile, image_formats.is_heif))

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register_heif_opener))


@pytest.fixture
def no_heif_plugin(monkeypatch: pytest.MonkeyPatch, fresh_formats: None) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM"])
def test_every_named_format_is_read_under_each_of_its_suffixes(format: str, tmp_path: Path) -> None:
    if format not in image_formats.readable_formats():
        pytest.skip(f"this Pillow has no {format}")
    content = encoded(Image.new("RGB", (8, 6), "white"), format)
    assert picture_size(content, "x") == (6, 8)
    assert min(open_picture(content, "x").getpixel((0, 0))) > 250
    for suffix in image_formats.SUFFIXES[format]:
        (tmp_path / f"{suffix[1:]}{suffix.upper()}").write_bytes(content)
    images = read_captioned_images(tmp_path, template="x")
    assert len(images) == len(image_formats.SUFFIXES[format])


@pytest.mark.parametrize("read", [open_picture, picture_size])
def test_postscript_is_not_run(read, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "check_call", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", refuse)
    with pytest.raises(BrokenImage, match=r"x\.png is broken: its content is of no image format that is read"):
        read(POSTSCRIPT, "x.png")


def test_whatever_a_decoder_raises_names_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: ImageFile.ImageFile) -> None:
        raise KeyError(42)

    content = encoded(Image.new("RGB", (2, 2)), "PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(BrokenImage, match=r"The image x\.png is broken"):
        open_picture(content, "x.png")


def test_floating_point_values_have_no_known_range() -> None:
    with pytest.raises(BrokenImage, match=r"x\.tif is broken: it holds floating-point values"):
        open_picture(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "x.tif")


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    for format in ("GIF", "TIFF", "PNG"):
        content = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        assert open_picture(content, "x").getpixel((0, 0)) == (255, 0, 0)


class TestHeic:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
        (tmp_path / "b.HEIC").write_bytes(HEIC_HEAD)
        return tmp_path

    @pytest.mark.usefixtures("heif_plugin")
    def test_it_is_read_with_the_plugin(self, folder: Path) -> None:
        images = read_captioned_images(folder, template="x")
        assert [image.path.name for image in images] == ["a.png", "b.HEIC"]
        assert open_picture(images[1].read(), "b.HEIC").getpixel((0, 0)) == (255, 0, 0)

    @pytest.mark.usefixtures("no_heif_plugin")
    def test_without_the_plugin_it_is_named(self, folder: Path) -> None:
        with pytest.raises(
            UserError, match=r"b\.HEIC cannot be read as an image here: pip install \"erasediff\[heif\]"
        ):
            read_captioned_images(folder, template="x")
        with pytest.raises(BrokenImage, match=r"x\.jpg is broken: it is in the format HEIF: pip install"):
            open_picture(HEIC_HEAD, "x.jpg")

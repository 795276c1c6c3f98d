"""Pictures are decoded by the formats that are named, whatever a file is called, and other images are named."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile

from erasediff.data import image_formats
from erasediff.data.image_folder import read_captioned_images
from erasediff.data.preprocessing import EXIF_ORIENTATION, BrokenImage, open_picture, picture_size
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


def png(width: int, height: int, *, bits: int = 8, color: int = 2, rows: bytes = b"", before: bytes = b"") -> bytes:
    """A PNG of any header, with ``rows`` uncompressed and whole chunks ``before`` them."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    end = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + end


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


NOISE = Image.effect_noise((64, 64), 50).convert("RGB")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (png(60_000, 60_000), r"it has more than the 178,956,970 pixels that are read: scale it down"),
        (png(0, 5), "its content is of no image format that is read"),
        (encoded(NOISE, "PNG")[:-300], "truncated"),
        (encoded(NOISE, "JPEG")[:-300], "truncated"),
        (encoded(NOISE, "TIFF")[:-300], ""),
        (encoded(Image.new("RGBA", (16, 16)), "ICO"), "its content is of no image format that is read"),
        (png(1, 1, rows=b"\0abc", before=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7)))), "too large"),
        (encoded(Image.fromarray(np.full((2, 2), 10**6, np.int32)), "TIFF"), "whole numbers of more than 16 bits"),
        (encoded(Image.fromarray(np.full((2, 2), -1, np.int32)), "TIFF"), "whole numbers of more than 16 bits"),
    ],
)
def test_what_cannot_be_read_rightly_is_named(content: bytes, said: str) -> None:
    with pytest.raises(BrokenImage, match=rf"^The image x\.png is broken: .*{said}"):
        open_picture(content, "x.png")


def palette_with_transparency() -> bytes:
    image = Image.new("RGB", (4, 2), (200, 0, 0)).convert("P")
    return encoded(image, "PNG", transparency=image.getpixel((0, 0)))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    return exif


RED = Image.new("RGB", (4, 2), (200, 0, 0))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    ("content", "size", "colour"),
    [
        (palette_with_transparency(), (4, 2), (255, 255, 255)),
        (encoded(Image.new("LA", (4, 2), (10, 0)), "PNG"), (4, 2), (255, 255, 255)),
        (encoded(Image.new("CMYK", (4, 2), (0, 255, 255, 0)), "TIFF"), (4, 2), (255, 0, 0)),
        (encoded(Image.new("CMYK", (4, 2), (0, 255, 255, 0)), "JPEG", quality=100), (4, 2), (255, 0, 0)),
        (encoded(Image.fromarray(np.full((2, 4), 32_896, np.uint16)), "PNG"), (4, 2), (128, 128, 128)),
        (png(1, 1, bits=16, rows=b"\0\xff\xff\x80\x00\0\0"), (1, 1), (255, 128, 0)),
        # The level 7 stands for transparency.
        (png(1, 1, bits=16, color=0, rows=b"\0\0\7", before=chunk(b"tRNS", b"\0\7")), (1, 1), (255, 255, 255)),
        (encoded(RED, "PNG", icc_profile=b"broken"), (4, 2), (200, 0, 0)),
        (encoded(RED, "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), (4, 2), (200, 0, 0)),
        (encoded(RED, "PNG", exif=turned(99)), (4, 2), (200, 0, 0)),
        (encoded(RED, "PNG", exif=turned(6)), (2, 4), (200, 0, 0)),
    ],
)
def test_odd_images_are_read_rightly(content: bytes, size: tuple[int, int], colour: tuple[int, int, int]) -> None:
    picture = open_picture(content, "x")
    assert picture.size == size
    assert picture_size(content, "x") == size[::-1]
    assert np.abs(np.subtract(picture.getpixel((0, 0)), colour)).max() <= 1


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_the_content_tells_the_format_and_not_the_suffix(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(encoded(RED, "BMP"))
    (image,) = read_captioned_images(tmp_path, template="x")
    assert open_picture(image.read(), str(path)).getpixel((0, 0)) == (200, 0, 0)


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

"""Image formats: those that Pillow is asked to decode, and files that are images but cannot be read here."""

from __future__ import annotations

import importlib
from contextlib import suppress
from functools import cache
from pathlib import Path

from PIL import Image, features

SUFFIXES = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "AVIF": (".avif", ".avifs"),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "HEIF": (".heic", ".heif", ".heics", ".heifs", ".hif"),
}
"""Suffixes of the formats that may be decoded, by Pillow's names. Others are refused whatever a file is called:
Pillow hands PostScript to Ghostscript, and takes some formats' fonts, palettes and previews for pictures."""

OPTIONAL_CODECS = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
HEIF_PLUGIN = "pillow_heif"

OTHER_SUFFIXES = """
    .jxl .jxr .wdp .qoi .tga .psd .psb .xcf .svg .eps .ps .exr .hdr .dds .pfm .pcx .ico .icns .xbm .xpm .ras .sgi
    .dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .orf .rw2 .raf .pef .srw .3fr .iiq .rwl .x3f .raw
"""
"""Suffixes of pictures in formats that are not read: layered documents, vector graphics, cameras' raw files."""

NO_IMAGE_SUFFIXES = """
    .txt .caption .json .jsonl .csv .tsv .md .html .xml .yaml .yml .toml .log .ini .db .py .sh .pdf .npy .npz .parquet
    .arrow .safetensors .pt .ckpt .zip .tar .gz .mp4 .mov .webm .mp3 .wav
"""
"""Suffixes of files that are not searched for a picture."""

MAGIC_BYTES = 12


@cache
def readable_formats() -> tuple[str, ...]:
    """Names of the formats in ``SUFFIXES`` that this Pillow decodes; HEIF if ``pillow_heif`` is installed."""
    with suppress(ImportError):
        importlib.import_module(HEIF_PLUGIN).register_heif_opener()
    Image.init()
    return tuple(
        name
        for name in SUFFIXES
        if name in Image.OPEN and (name not in OPTIONAL_CODECS or features.check(OPTIONAL_CODECS[name]))
    )


@cache
def readable_suffixes() -> frozenset[str]:
    """Suffixes, in lower case, of the formats that are read."""
    return frozenset(suffix for name in readable_formats() for suffix in SUFFIXES[name])


@cache
def unreadable_suffixes() -> frozenset[str]:
    """Suffixes, in lower case, of images that cannot be read here."""
    known = {suffix for suffixes in SUFFIXES.values() for suffix in suffixes} | {*OTHER_SUFFIXES.split()}
    return frozenset(known) - readable_suffixes()


def holds_image(path: Path) -> bool:
    """Return true if the file's suffix says nothing and its first bytes are those of an image format."""
    suffix = path.suffix.lower()
    if suffix in _no_image_suffixes():
        return False
    try:
        with path.open("rb") as file:
            return starts_image(file.read(MAGIC_BYTES))
    except OSError:
        return False


def starts_image(head: bytes) -> bool:
    """Return true for the first bytes of a PNG, JPEG, GIF, TIFF, WebP, JPEG 2000, AVIF or HEIF file."""
    return (
        head.startswith(
            (
                b"\x89PNG\r\n\x1a\n",
                b"\xff\xd8\xff",
                b"GIF8",
                b"II*\0",
                b"MM\0*",
                b"\0\0\0\x0cjP  ",
            )
        )
        or (head.startswith(b"RIFF") and head[8:12] == b"WEBP")
        or is_heif(head)
        or (head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"))
    )


def is_heif(head: bytes) -> bool:
    """Return true for the first bytes of a HEIF file, as telephones write them."""
    return head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1")


def conversion_advice(suffix: str) -> str:
    """Advice for an image of this suffix that cannot be read here."""
    if suffix in SUFFIXES["HEIF"]:
        return 'pip install "erasediff[heif]", or convert it to PNG'
    return "convert it to PNG, or move it out of the folder"


@cache
def _no_image_suffixes() -> frozenset[str]:
    return frozenset(NO_IMAGE_SUFFIXES.split())

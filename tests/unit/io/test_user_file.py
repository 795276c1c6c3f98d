"""Pipes, sockets, devices and folders in the place of files are refused by name, and never opened."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from erasediff.config import load_config
from erasediff.data.forget_split import select_files
from erasediff.data.image_folder import read_captioned_images
from erasediff.data.prompt_images import read_prompts
from erasediff.data.sources.base import ReadOptions
from erasediff.data.sources.npz import SOURCE as NPZ
from erasediff.data.sources.parquet import SOURCE as PARQUET
from erasediff.data.sources.shard_index import shard_index
from erasediff.errors import UserError
from erasediff.io.json_file import read_object
from erasediff.io.jsonl import MetricsFile
from erasediff.io.state_file import load_state, open_state
from erasediff.io.tensor_file import TensorFile
from erasediff.io.user_file import check_regular, read_bytes, read_text, special_kind
from erasediff.models.weight_masks import load_masks
from erasediff.parallel.zero.config import read_own

pytestmark = pytest.mark.timeout(20)


def pipe(path: Path) -> str:
    os.mkfifo(path)
    return "a named pipe"


def listening(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as server:
        # By its name alone: a path may be longer than the address of a socket.
        before = Path.cwd()
        os.chdir(path.parent)
        try:
            server.bind(path.name)
        finally:
            os.chdir(before)
    return "a socket"


def device(path: Path) -> str:
    path.symlink_to("/dev/zero")
    return "a device"


def folder(path: Path) -> str:
    path.mkdir()
    return "a folder"


def opened_state(path: Path) -> None:
    with open_state(path):
        pass


READERS: dict[str, Callable[[Path], Any]] = {
    "config.yaml": load_config,
    "forget.txt": lambda path: select_files([], path),
    "prompts.txt": read_prompts,
    "images.npz": lambda path: NPZ.read(str(path), ReadOptions()),
    "model_index.json": read_object,
    "metrics.jsonl": lambda path: list(MetricsFile(path).read()),
    "resumed.jsonl": lambda path: MetricsFile(path).continue_after(0),
    "state.safetensors": load_state,
    "lazy.safetensors": opened_state,
    "lora.safetensors": TensorFile.open,
    "mask.safetensors": load_masks,
    "zero.json": read_own,
    "shard.tar": shard_index,
    "any": lambda path: read_bytes(path, 100),
    "text": read_text,
}


@pytest.mark.parametrize("make", [pipe, listening, device, folder])
@pytest.mark.parametrize("name", list(READERS))
def test_what_is_no_file_is_refused_by_name(make: Callable[[Path], str], name: str, tmp_path: Path) -> None:
    kind = make(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name} is {kind}, not a file"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("make", [pipe, listening, device])
def test_what_is_neither_a_table_nor_a_folder_of_them(make: Callable[[Path], str], tmp_path: Path) -> None:
    kind = make(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=rf"x\.parquet is {kind}, not a file"):
        PARQUET.read(str(tmp_path / "x.parquet"), ReadOptions())


@pytest.mark.parametrize("name", ["a.png", "metadata.jsonl", "metadata.csv", "b.txt", "b.caption"])
def test_a_pipe_in_an_image_folder(name: str, images: Path) -> None:
    pipe(images / name)
    with pytest.raises(UserError, match=rf"{name} is (a named pipe|no file)"):
        read_captioned_images(images, template="x", captions=True)


def test_a_pipe_that_is_no_image_is_not_looked_at(images: Path) -> None:
    pipe(images / "picture")
    assert len(read_captioned_images(images, template="x")) == 1


@pytest.fixture
def images(tmp_path: Path) -> Path:
    Image.new("RGB", (2, 2)).save(tmp_path / "b.png")
    return tmp_path


def test_files_and_nothing_pass(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes("\ufeffa\r\nb\rc".encode())
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link", "missing", "a\0b", "x" * 300):
        assert special_kind(tmp_path / name) is None
    check_regular(tmp_path / "link")
    assert read_text(tmp_path / "link") == "a\nb\nc"
    with pytest.raises(UserError, match="at most 0 MB are read"):
        read_bytes(tmp_path / "file", 3)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens and cannot be read")
def test_a_fault_of_reading_names_the_file(tmp_path: Path) -> None:
    link = tmp_path / "metrics.jsonl"
    link.symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error") as caught:
        read_bytes(link, 10)
    assert caught.value.filename == str(link)

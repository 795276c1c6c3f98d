"""Files that are not what their names say, shards that do not belong together, names and links that lead elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

from erasediff.errors import UserError
from erasediff.io.file_faults import fault_of
from erasediff.models.load import load_text_to_image

pytestmark = pytest.mark.usefixtures("one_thread")
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 3438167536\n"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(nano_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(nano_folder("sd"), tmp_path / "sd"))


def refused(source: Path, match: str) -> str:
    with pytest.raises(UserError, match=match) as caught:
        load_text_to_image(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "file", [UNET, "vae/config.json", "model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"]
)
def test_pointers_pages_and_nothing_are_named(folder: Path, file: str) -> None:
    path = folder / file
    if file.startswith("tokenizer") and not path.exists():
        path = folder / "tokenizer" / "vocab.json"
    path.write_text(POINTER)
    assert str(path) in refused(folder, "is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")
    path.write_text("<!DOCTYPE html><html><body>Please log in</body></html>")
    refused(folder, "is a web page, not the file itself")
    path.write_bytes(b"")
    refused(folder, "is empty; download it again|is damaged")


def test_a_pointer_in_the_place_of_a_lora_or_a_single_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text(POINTER)
    refused(tmp_path / "x.safetensors", "cannot be read as safetensors: it is a Git LFS pointer")


def test_a_file_that_is_cut_short(folder: Path) -> None:
    whole = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(whole[:-1])
    refused(folder, "cannot be read as safetensors: it is cut short; download or copy it again")


def test_a_link_of_the_cache_to_a_file_that_was_deleted(folder: Path) -> None:
    (folder / UNET).unlink()
    (folder / UNET).symlink_to("blob")
    refused(folder, "is a link to a file that is not there; download it again")


@pytest.fixture
def sharded(nano: Any, tmp_path: Path) -> Path:
    path: Path = nano.save("sd", tmp_path / "sharded", max_shard_size="50KB")
    return path


def test_shards_without_their_index(sharded: Path, nano: Any, tmp_path: Path) -> None:
    (sharded / "unet" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    refused(sharded, r"shards of weights without their index: add diffusion_pytorch_model\.safetensors\.index\.json\.$")
    variant = nano.save("sd", tmp_path / "variant", max_shard_size="50KB", variant="fp16")
    next((variant / "unet").glob("*.index.*")).unlink()
    refused(variant, r"without their index: add diffusion_pytorch_model\.safetensors\.index\.fp16\.json\.$")


def test_a_shard_that_its_index_names_and_that_is_missing(sharded: Path) -> None:
    shard = sorted((sharded / "unet").glob("*-of-*"))[1]
    shard.rename(shard.with_name(f"{shard.name}.incomplete"))
    refused(sharded, f"names {shard.name}, which is missing: its download is not complete; finish it")
    shard.with_name(f"{shard.name}.incomplete").unlink()
    refused(sharded, f"index.json names {shard.name}, which is missing: copy or download it")


def test_a_download_that_did_not_end(folder: Path) -> None:
    (folder / UNET).unlink()
    parts = folder / ".cache" / "huggingface" / "download" / "unet"
    parts.mkdir(parents=True)
    (parts / "diffusion_pytorch_model.safetensors.0a1b.incomplete").write_bytes(b"part")
    refused(folder, r"the download of .*unet did not end \(diffusion_pytorch_model\.safetensors\.0a1b\.incomplete\)")


@pytest.mark.parametrize("name", ["../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", "..", ""])
def test_an_index_that_names_a_shard_elsewhere(sharded: Path, name: str) -> None:
    index = sharded / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["conv_in.bias"] = name
    index.write_text(json.dumps(content))
    refused(sharded, "which is no file or folder beside it: the checkpoint is damaged")
    index.write_text(json.dumps({"weight_map": ["x"]}))
    refused(sharded, "has no weight_map")


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "unet/../../evil", "a\\b", "..", "."])
def test_an_index_that_names_a_component_elsewhere(folder: Path, name: str) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, name: ["transformers", "CLIPTokenizer"]}))
    refused(folder, "which is no file or folder beside it")


@pytest.mark.parametrize("place", ["tokenizer/notes.txt", "unet/x.json", "LICENSE", "vae"])
def test_links_that_lead_out_of_the_checkpoint(folder: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "secret").write_text("secret")
    if place == "vae":
        (folder / "vae").rename(tmp_path / "elsewhere")
        (folder / "vae").symlink_to(tmp_path / "elsewhere")
    else:
        (folder / place).symlink_to(tmp_path / "secret")
    refused(folder, f"{place} is a link that leads out of the checkpoint: put what it stands for in its place")


def test_links_within_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    (folder / "vae").rename(folder / "vae-ft-mse")
    (folder / "vae").symlink_to("vae-ft-mse")
    (folder / "link").symlink_to(folder)
    (folder / "all-in-one.safetensors").symlink_to(tmp_path / "elsewhere")
    load_text_to_image(folder).save(tmp_path / "out")
    assert (tmp_path / "out" / "vae" / "config.json").is_file()
    assert not (tmp_path / "out" / "link").exists()
    (folder / "tokenizer" / "loop").symlink_to("..")
    refused(folder, "loop is a link to a folder")


def test_links_of_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--some-one--some-model"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / str(number))
        link.symlink_to(blobs / str(number))
    load_text_to_image(snapshot).save(tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_entries_of_the_index_that_are_no_classes(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "unet": ["diffusers", 5]}))
    refused(folder, "its unet is no pair of a library and a class")


def test_an_unknown_dtype(folder: Path) -> None:
    tensors = load((folder / UNET).read_bytes())
    save_file({**tensors, "conv_in.bias": tensors["conv_in.bias"].to(torch.complex64)}, folder / UNET)
    refused(folder, "holds conv_in.bias as C64, which is not known here: give the weights in float32")
    save_file({**tensors, "conv_in.bias": tensors["conv_in.bias"].to(torch.float8_e8m0fnu)}, folder / UNET)
    refused(folder, "holds conv_in.bias as F8_E8M0, which is not known here")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a Linux file whose bytes cannot be read")
def test_a_file_whose_disk_refuses() -> None:
    assert fault_of(Path("/proc/self/mem")) == "input/output error"

"""Receipts of runs of every kind, from the command line: each is verified, and names the run that it follows."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import Ended
from nano import FAMILY_EXAMPLES
from pictures import class_pictures

from erasediff.provenance.digests import file_sha256

NANO = """
threads: 1
model: {block_out_channels: [8, 16], layers_per_block: 1}
train: {steps: 2, batch_size: 4}
images: {height: 32, width: 32, bucket_step: 16, caption_template: "a {class}"}
unlearn: {steps: 2, batch_size: 2, lr: 1.0e-3}
run: {log_every: 1, look_every: 0}
"""
Run = Callable[..., Ended]
Folder = Callable[[str], Path]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "nano.yaml").write_text(NANO)
    class_pictures(tmp_path / "data")
    return tmp_path


@pytest.fixture
def finish(run: Run) -> Callable[..., dict[str, Any]]:
    """``finish(out, *arguments)``: a run that ends well and is verified at once, and its receipt."""

    def finished(out: str, *arguments: object) -> dict[str, Any]:
        ended = run(*arguments, "--config", "nano.yaml", "--data", "data", "--out", out)
        assert ended.code == 0, ended.errors
        ended = run("verify", out, "--data", "data", "--json")
        assert (ended.code, json.loads(ended.output)["faults"]) == (0, []), ended.output
        receipt: dict[str, Any] = json.loads(Path(out, "receipt.json").read_bytes())
        assert str(Path.cwd()) not in Path(out, "receipt.json").read_text()
        return receipt

    return finished


def test_a_pixel_model_is_trained_and_unlearned(finish: Callable[..., dict[str, Any]], run: Run, here: Path) -> None:
    trained = finish("base", "train")
    assert trained["input"] == {"model": None}
    assert trained["moves"] is trained["previous"] is None
    first = finish("first", "unlearn", "--model", "base/model", "--forget-class", "bird")
    assert first["previous"] == {"path": "../base/receipt.json", "sha256": file_sha256(here / "base/receipt.json")}
    assert first["moves"]["moved"].keys() <= {f"unet.{name}" for name in tensors_of(first, "unet")}
    second = finish("second", "unlearn", "--model", "first/model", "--forget-class", "cat")
    assert second["previous"]["sha256"] == file_sha256(here / "first/receipt.json")
    shutil.copytree("first", "moved/first")
    shutil.copytree("second", "moved/second")
    assert run("verify", "moved/second").code == 0
    for folder in ("first", "second", "base"):
        shutil.rmtree(folder)
    assert run("verify", "moved/first").code == 2


def tensors_of(receipt: dict[str, Any], component: str) -> set[str]:
    files = receipt["files"].items()
    return {name for path, file in files if f"/{component}/" in path for name in file.get("tensors") or ()}


@pytest.mark.parametrize("family", FAMILY_EXAMPLES)
def test_a_text_to_image_model_in_shards(
    finish: Callable[..., dict[str, Any]], nano_folder: Folder, family: str, here: Path
) -> None:
    shutil.copytree(nano_folder(family), "model")
    settings = ("--set", "output.max_shard_bytes=60000")
    receipt = finish("run", "unlearn", "--model", "model", "--forget-class", "bird", *settings)
    assert any("-of-" in name for name in receipt["files"])
    assert receipt["moves"]["unmoved"] > len(receipt["moves"]["moved"]) > 0


def test_a_lora_is_covered_beside_the_merged_model(
    finish: Callable[..., dict[str, Any]], nano_folder: Folder, here: Path
) -> None:
    shutil.copytree(nano_folder("sd"), "model")
    receipt = finish("run", "unlearn", "--model", "model", "--forget-class", "bird", "--train", "lora")
    assert receipt["files"]["lora.safetensors"]["tensors"]
    assert receipt["moves"]["moved"]
    merged = ("unlearn", "--model", "model", "--lora", "run/lora.safetensors", "--forget-class", "cat")
    assert list(finish("again", *merged)["input"]["lora"]["files"]) == ["lora.safetensors"]


def test_single_files(finish: Callable[..., dict[str, Any]], nano_folder: Folder, run: Run, here: Path) -> None:
    shutil.copytree(nano_folder("sd"), "model")
    as_file = ("--set", "output.layout=single-file")
    finish("run", "unlearn", "--model", "model", "--forget-class", "bird", *as_file)
    shutil.copy("run/model.safetensors", "sd.safetensors")
    for out, flags in (("again", as_file), ("folder", ())):
        config = ("--set", "text_to_image.config=model")
        receipt = finish(out, "unlearn", "--model", "sd.safetensors", "--forget-class", "cat", *config, *flags)
        assert list(receipt["input"]["model"]["files"]) == ["sd.safetensors"]
        assert receipt["moves"]["removed"] == receipt["moves"]["added"] == []
    Path("sd.safetensors").rename("renamed.safetensors")
    assert run("verify", "again", "--base", "renamed.safetensors").code == 0


def test_a_signed_run(finish: Callable[..., dict[str, Any]], run: Run, here: Path) -> None:
    if shutil.which("ssh-keygen") is None:
        pytest.skip("there is no ssh-keygen")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "key"], check=True)
    Path("signers").write_text(f"me@example.org {Path('key.pub').read_text()}")
    finish("run", "train", "--sign", "ssh:key")
    assert run("verify", "run", "--signer", "signers").code == 0
    refused = run("train", "--config", "nano.yaml", "--data", "data", "--out", "other", "--sign", "ssh:missing")
    assert refused.code == 2
    assert not Path("other").exists()

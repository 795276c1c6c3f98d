"""Runs that end without a result: exit code 3, one sentence, no model; and what keeps a small update."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import Ended, folder_weights
from PIL import Image
from safetensors.torch import load_file, save_file

from erasediff.models import PixelModel

pytestmark = pytest.mark.usefixtures("one_thread")
Run = Callable[..., Ended]
NANO = """
threads: 1
images: {height: 32, width: 32, bucket_step: 16}
unlearn: {steps: 2, batch_size: 2}
"""
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ERASEDIFF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "nano.yaml").write_text(NANO)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), "red" if name == "cat" else "blue").save(tmp_path / f"photos/{name}/0.png")
        (tmp_path / f"photos/{name}/0.txt").write_text(f"a {name}")
    return tmp_path


@pytest.fixture
def fp8(nano_folder: Callable[[str], Path], here: Path) -> Path:
    """A checkpoint with the matrices of its UNet in fp8."""
    source = Path(shutil.copytree(nano_folder("sd"), here / "fp8"))
    weights = load_file(source / UNET)
    save_file({name: t.to(torch.float8_e4m3fn) if t.ndim > 1 else t for name, t in weights.items()}, source / UNET)
    return source


def command(model: object, *flags: object) -> tuple[object, ...]:
    cats = ("--data", "photos", "--forget-class", "cat", "--config", "nano.yaml")
    return ("unlearn", "--model", model, *cats, "--out", "out", *flags)


def sentence(ended: Ended) -> str:
    assert ended.code == 3
    assert ended.output == ""
    said = ended.errors.partition("Error: ")[2].strip()
    assert "\n" not in said
    assert not Path("out/model").exists()
    return said


def test_a_diverged_run_of_the_digits(run: Run) -> None:
    PixelModel.build(num_classes=10, block_out_channels=(8, 8), layers_per_block=1).save(Path("base"))
    small = ("--forget", 3, "--steps", 4, "--batch-size", 4, "--device", "cpu")
    ended = run("unlearn", "--model", "base", *small, "--lr", 1e30, "--out", "out")
    assert "3 of 4 steps were skipped" in sentence(ended)


@pytest.mark.parametrize("train", ["xattn", "lora"])
def test_a_run_that_changes_nothing(run: Run, nano_folder: Callable[[str], Path], train: str) -> None:
    said = sentence(run(*command(nano_folder("sd"), "--lr", 1e-60, "--train", train)))
    assert ("The LoRA is zero" if train == "lora" else "No weight of the model changed") in said
    assert not Path("out/lora.safetensors").exists()


def test_an_update_too_small_for_fp8_is_saved_wider(run: Run, fp8: Path) -> None:
    ended = run(*command(fp8))
    assert ended.code == 0
    assert "The stored dtype would lose" in ended.errors
    before, after = folder_weights(fp8), folder_weights(Path("out/model"))
    trained = [name for name in before if "attn2" in name and before[name].ndim > 1]
    assert {after[name].dtype for name in trained} == {torch.float32}
    assert all(bool((before[name].float() != after[name]).any()) for name in trained)
    assert all(before[name].dtype == after[name].dtype for name in before if "attn2" not in name)


def test_an_update_that_the_dtype_asked_for_swallows(run: Run, fp8: Path) -> None:
    said = sentence(run(*command(fp8, "--train", "re:attn2.*to_k.weight", "--set", "output.dtype=stored")))
    assert "weights that changed still differs" in said


def test_a_lora_is_merged_first_and_training_changes_nothing(run: Run, nano_folder: Callable[[str], Path]) -> None:
    """The model differs from the checkpoint, but by no step."""
    assert run(*command(nano_folder("sd"), "--train", "lora", "--lr", 1e-3)).code == 0
    Path("out").rename("lora")
    said = sentence(run(*command(nano_folder("sd"), "--lora", "lora/lora.safetensors", "--lr", 1e-60)))
    assert "No weight of the model changed" in said

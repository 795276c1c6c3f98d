"""The method saemnesia from the command line, on a nano Stable Diffusion."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import run_command

from erasediff.sae import ConceptEraser

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {
    "block": "up_blocks.1.attentions.0",
    "images_per_prompt": "2",
    "held_out": "2",
    "num_inference_steps": "2",
    "guidance_scale": "3.0",
    "expansion": "2",
    "k": "4",
    "batch_size": "128",
    "intervention": "steer",
    "strength": "-30.0",
}


def unlearn(model: Path, out: Path, *more: str) -> object:
    settings = [word for name, value in SETTINGS.items() for word in ("--set", f"saemnesia.{name}={value}")]
    return run_command("unlearn", "--method", "saemnesia", "--model", str(model), "--out", str(out), *settings, *more)


def test_unlearn_then_sample(
    nano_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERASEDIFF_CACHE", str(tmp_path / "cache"))
    model, out = nano_folder("sd"), tmp_path / "out"
    assert unlearn(model, out, "--forget-prompts", "a cat") == 2
    assert not out.exists()
    prompts = ("--forget-prompts", "a cat", "--retain-prompts", "a dog;a sofa")
    assert unlearn(model, out, *prompts) == 0
    assert sorted(path.name for path in out.iterdir()) == ["config.yaml", "receipt.json", "saemnesia"]
    assert unlearn(model, out, *prompts) == 2
    draw = ("sample", "--model", str(model), "--prompts", "a cat", "--set", "sample.num_inference_steps=2", "--out")
    assert run_command(*draw, str(tmp_path / "before.png")) == 0
    assert run_command(*draw, str(tmp_path / "after.png"), "--saemnesia", str(out / "saemnesia")) == 0
    assert (tmp_path / "before.png").read_bytes() != (tmp_path / "after.png").read_bytes()
    assert run_command(*draw, str(tmp_path / "none.png"), "--saemnesia", str(out / "nothing")) == 2
    assert not (tmp_path / "none.png").exists()


def test_one_concept_after_another(
    nano_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERASEDIFF_CACHE", str(tmp_path / "cache"))
    model = nano_folder("sd")
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    templates = "--set", 'saemnesia.templates=["{}", "a photo of {}"]'
    assert unlearn(model, first, "--forget-prompts", "a cat", "--retain-prompts", "a dog;a sofa", *templates) == 0
    cached = sorted((tmp_path / "cache").rglob("*"))
    then = "--set", f"saemnesia.eraser={first / 'saemnesia'}", "--forget-prompts"
    assert unlearn(model, second, *then, "a sofa") == 0
    # Nothing is drawn or trained again.
    assert sorted((tmp_path / "cache").rglob("*")) == cached
    before, after = (ConceptEraser.load(path / "saemnesia") for path in (first, second))
    assert [[one.concepts[number] for number in one.erased] for one in (before, after)] == [
        ["a cat"],
        ["a cat", "a sofa"],
    ]
    assert torch.equal(after.autoencoder.W_enc, before.autoencoder.W_enc)
    assert unlearn(model, third, *then, "a bird") == 2
    assert unlearn(model, third, *then, "a sofa;a dog") == 2
    assert not third.exists()


def test_a_template_without_a_place_for_the_prompt(nano_folder: Callable[[str], Path], tmp_path: Path) -> None:
    prompts = ("--forget-prompts", "a cat", "--retain-prompts", "a dog")
    assert unlearn(nano_folder("sd"), tmp_path / "out", *prompts, "--set", 'saemnesia.templates=["a photo"]') == 2
    assert not (tmp_path / "out").exists()

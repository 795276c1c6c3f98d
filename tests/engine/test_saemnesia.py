"""The method saemnesia from the command line, on a nano Stable Diffusion."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from erasediff.cli.main import main

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {
    "block": "up_blocks.1.attentions.0",
    "images_per_prompt": "2",
    "num_inference_steps": "2",
    "guidance_scale": "3.0",
    "expansion": "2",
    "k": "4",
    "batch_size": "128",
    "intervention": "steer",
    "strength": "-30.0",
}


def run(*arguments: str) -> int:
    """The command's exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["erasediff", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def unlearn(model: Path, out: Path, *more: str) -> int:
    settings = [word for name, value in SETTINGS.items() for word in ("--set", f"saemnesia.{name}={value}")]
    return run("unlearn", "--method", "saemnesia", "--model", str(model), "--out", str(out), *settings, *more)


def test_unlearn_then_sample(
    nano_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERASEDIFF_CACHE", str(tmp_path / "cache"))
    model, out = nano_folder("sd"), tmp_path / "out"
    assert unlearn(model, out, "--forget-prompts", "a cat") == 2
    assert not out.exists()
    prompts = ("--forget-prompts", "a cat", "--retain-prompts", "a dog;a sofa")
    assert unlearn(model, out, *prompts) == 0
    assert sorted(path.name for path in out.iterdir()) == ["config.yaml", "saemnesia"]
    assert unlearn(model, out, *prompts) == 2
    draw = ("sample", "--model", str(model), "--prompts", "a cat", "--set", "sample.num_inference_steps=2", "--out")
    assert run(*draw, str(tmp_path / "before.png")) == 0
    assert run(*draw, str(tmp_path / "after.png"), "--saemnesia", str(out / "saemnesia")) == 0
    assert (tmp_path / "before.png").read_bytes() != (tmp_path / "after.png").read_bytes()
    assert run(*draw, str(tmp_path / "none.png"), "--saemnesia", str(out / "nothing")) == 2
    assert not (tmp_path / "none.png").exists()

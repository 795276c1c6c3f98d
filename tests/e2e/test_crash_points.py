"""Commands that are killed at a call that changes the disk, and continued: they end in the bits of one never killed.

``ERASEDIFF_KILLS`` limits the kills of each slow case, which are evenly spaced then.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from crash_points import FULL, SECONDS, Case, contents, different, kill_at_each_call, leftovers, run_whole, start
from PIL import Image
from safetensors.torch import load_file

from erasediff.models import PixelModel
from erasediff.models.weight_masks import save_masks
from erasediff.parallel.control_plane import ControlPlane
from erasediff.training.checkpoint import Checkpoint

TINY = """
device: cpu
threads: 1
model: {block_out_channels: [8, 8], layers_per_block: 1}
train: {steps: 3, batch_size: 4}
unlearn: {forget: [3], steps: 3, batch_size: 4, barrier: gap, target: uniform, lr: 1.0e-3}
run: {checkpoint_every: 1, keep_checkpoints: 1, log_every: 1}
"""
NANO = """
device: cpu
threads: 1
images: {height: 32, width: 32, bucket_step: 16, images_per_prompt: 1}
text_to_image: {lora_rank: 2}
unlearn: {steps: 2, batch_size: 2, lr: 1.0e-3}
sample: {num_inference_steps: 1}
run: {checkpoint_every: 1, keep_checkpoints: 1, log_every: 1}
"""
MODELS = ("model", "model.safetensors", "lora.safetensors")
CLI = "forked:erasediff"


def command(name: str, *words: object) -> Callable[[Path], list[str]]:
    return lambda place: [CLI, name, "--out", str(place / "run"), *map(str, words)]


def continued(begin: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
    """``--resume latest``, or from before there was a run the same command."""

    def words(place: Path) -> list[str]:
        begun = begin(place)
        if not (place / "run" / "config.yaml").exists():
            return begun
        return [*begun[:2], "--resume", "latest", "--out", str(place / "run")]

    return words


def all_whole(killed: Path, whole: Path) -> None:
    """Every checkpoint matches its checksums, and a model that is there is that of the uninterrupted run."""
    for checkpoint in Checkpoint.of_run(killed / "run"):
        with checkpoint.fragments(ControlPlane()):
            pass
    for name in MODELS:
        for found in (killed / "run").glob(name):
            of_whole = whole / "run" / name
            if found.is_dir():
                assert different(contents(found), contents(of_whole)) == []
            else:
                assert found.read_bytes() == of_whole.read_bytes()


def run_case(name: str, begin: Callable[[Path], list[str]]) -> Case:
    return Case(name, begin, continued(begin), all_whole, compared="run")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations, captioned images and a base model."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "nano.yaml").write_text(NANO)
    PixelModel.build(num_classes=10, block_out_channels=(8, 8), layers_per_block=1).save(folder / "base")
    for number, (name, colour) in enumerate((("cat", "red"), ("dog", "blue"), ("dog", "green"))):
        (folder / "photos" / name).mkdir(parents=True, exist_ok=True)
        path = folder / "photos" / name / f"{number}.png"
        Image.new("RGB", (32, 32), colour).save(path)
        path.with_suffix(".txt").write_text(f"a {name}")
    return folder


def test_training_that_is_killed_loses_nothing(place: Path, tmp_path: Path) -> None:
    """At a few of its calls; ``test_every_call_of_a_command`` tries all."""
    kill_at_each_call(run_case("train", command("train", "--config", place / "tiny.yaml")), tmp_path, most=4)


def test_a_disk_that_fills_up_costs_no_checkpoint(place: Path, tmp_path: Path) -> None:
    """From some call on, whatever needs room fails; the same command with ``--resume latest`` goes on afterwards."""
    begin = command("train", "--config", place / "tiny.yaml")
    whole = tmp_path / "whole"
    calls = run_whole(run_case("train", begin), whole)
    second = next(number for number, call in enumerate(calls, start=1) if "checkpoint-2" in call)
    model = next(number for number, call in enumerate(calls, start=1) if "model" in call)
    for number in (second + 1, model + 1):
        full = tmp_path / f"full-{number}"
        process = start(begin(full), full, number, **{FULL: "yes"})
        _, errors = process.communicate(timeout=SECONDS)
        assert process.returncode == 2, errors
        assert errors.count("Error: The disk is full") == 1
        assert "Traceback" not in errors
        assert leftovers(full) == []
        assert Checkpoint.newest(full / "run") is not None
        all_whole(full, whole)
        process = start(continued(begin)(full), full)
        _, errors = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, errors
        assert different(contents(full / "run"), contents(whole / "run")) == []


def cases(place: Path, source: Path) -> dict[str, Case]:
    """Cases by name."""
    weights = load_file(source / "unet" / "diffusion_pytorch_model.safetensors")
    save_masks({name: w > 0 for name, w in weights.items() if "attn2.to_k" in name}, place / "mask.safetensors")
    nano = ("--model", source, "--config", place / "nano.yaml")
    photos = (*nano, "--data", place / "photos", "--forget-class", "cat")
    prompts = ("--forget-prompts", "a cat", "--retain-prompts", "a dog")
    drawn = command("unlearn", *nano, *prompts)
    mask, nothing = command("mask", *nano, "--mask", place / "mask.safetensors"), ["crash_cases:nothing"]
    asked = ("--prompts", "a cat;a dog", "--control", "a bird;a tree", "--config", place / "nano.yaml", "--count", 1)
    scanned = command("scan", source, *asked, "--set", "sample.num_inference_steps=50")
    runs = {
        "train": command("train", "--config", place / "tiny.yaml"),
        "unlearn": command("unlearn", "--model", place / "base", "--config", place / "tiny.yaml"),
        "shards": command("unlearn", *photos, "--set", "output.max_shard_bytes=100000"),
        "single file": command("unlearn", *photos, "--set", "output.layout=single-file"),
        "lora": command("unlearn", *photos, "--train", "lora"),
    }
    return {name: run_case(name, begin) for name, begin in runs.items()} | {
        "cached model": Case(
            "cached model", lambda _: ["crash_cases:obtain_model", str(place / "tiny.yaml")], compared="cache"
        ),
        "mask": Case("mask", mask, lambda out: nothing if (out / "run").exists() else mask(out), compared="run"),
        "scan": Case("scan", scanned, scanned, compared="run"),
        # A run lists the images of its cache by their paths.
        "prompts": Case("prompts", drawn, continued(drawn), all_whole, compared="run/model"),
    }


NAMES = ("train", "unlearn", "shards", "single file", "lora", "prompts", "cached model", "mask", "scan")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_call_of_a_command(place: Path, nano_folder: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    case = cases(place, nano_folder("sd"))[name]
    most = os.environ.get("ERASEDIFF_KILLS")
    kills = kill_at_each_call(case, tmp_path, most=None if most is None else int(most))
    print(f"{name}: {kills.total()} kills: {dict(kills)}")

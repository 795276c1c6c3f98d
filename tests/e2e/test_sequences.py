"""Requests one after another: what earlier runs forgot is never retained again, and rehearsed by what is drawn now."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import Ended, folder_weights
from pictures import class_pictures

from erasediff.config import load_config

NANO = """
threads: 1
model: {block_out_channels: [8, 16], layers_per_block: 1}
train: {steps: 2, batch_size: 4}
images: {height: 32, width: 32, bucket_step: 16, caption_template: "a {class}"}
unlearn: {steps: 2, batch_size: 2, lr: 1.0e-3}
sample: {num_inference_steps: 1}
run: {log_every: 1, look_every: 0}
"""
TWO_IMAGES = ("--set", "images.images_per_prompt=2")
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
def unlearn(run: Run, here: Path) -> Callable[..., Ended]:
    def unlearned(*flags: object) -> Ended:
        return run("unlearn", "--config", "nano.yaml", "--data", "data", *flags)

    return unlearned


def listed(run: str, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(run, f"{name}.jsonl").read_text().splitlines()]


def conditions(run: str, name: str) -> set[str]:
    return {record.get("caption") or record["class"] for record in listed(run, name)}


def test_a_text_to_image_model_forgets_one_thing_after_another(
    unlearn: Callable[..., Ended], run: Run, nano_folder: Folder
) -> None:
    shutil.copytree(nano_folder("sd"), "model")
    assert unlearn("--model", "model", "--forget-class", "bird", "--out", "first").code == 0
    ended = unlearn("--after", "first", "--forget-class", "cat", *TWO_IMAGES, "--out", "second")
    assert ended.code == 0, ended.errors
    config = load_config(Path("second/config.yaml"))
    assert (config.unlearn.model, config.images.after) == (Path("first/model"), Path("first"))
    assert conditions("second", "forget") == {"a cat"}
    rehearsed = [record for record in listed("second", "retain") if "selected_by" in record]
    kept = [record for record in listed("second", "retain") if "selected_by" not in record]
    assert {record["caption"] for record in kept} == {"a airplane"}
    assert {record["selected_by"][0] for record in rehearsed} == {"after: a bird"}
    assert len(rehearsed) == 2
    assert "a bird" not in config.text_to_image.anchor_prompts
    assert run("verify", "second").code == 0
    before, after = folder_weights(Path("first/model")), folder_weights(Path("second/model"))
    assert any(not before[name].equal(after[name]) for name in before)
    # All is forgotten but what there is to retain.
    plain = ("--set", "images.rehearsal_share=0", "--dry-run", "--json")
    assert unlearn("--after", "second", "--forget-class", "airplane", *plain).code == 2
    assert unlearn("--after", "first", "--model", "first/model", "--forget-class", "cat", *plain).code == 0
    # Nothing of the earlier request is needed any more.
    shutil.rmtree("data/bird")
    assert unlearn("--after", "first", "--forget-class", "cat", *TWO_IMAGES, "--out", "third").code == 0
    assert conditions("third", "retain") == conditions("second", "retain")


def test_prompts_that_a_method_without_images_forgot_are_rehearsed(
    unlearn: Callable[..., Ended], run: Run, nano_folder: Folder
) -> None:
    shutil.copytree(nano_folder("sd"), "model")
    esd = ("--method", "esd", "--model", "model", "--forget-prompts", "a bird", "--config", "nano.yaml")
    ended = run("unlearn", *esd, "--train", "esd-x", "--out", "first")
    assert ended.code == 0, ended.errors
    assert unlearn("--after", "first", "--forget-class", "cat", *TWO_IMAGES, "--out", "second").code == 0
    assert conditions("second", "retain") == {"a airplane", "a bird"}
    assert {record["selected_by"][0] for record in listed("second", "retain") if "selected_by" in record} == {
        "after: a bird"
    }


@pytest.mark.parametrize("asked", [("--forget-phrase", "bird"), ("--forget-files", "list.txt")])
def test_what_was_asked_for_by_words_or_files_is_not_retained(
    unlearn: Callable[..., Ended], nano_folder: Folder, asked: tuple[str, str]
) -> None:
    shutil.copytree(nano_folder("sd"), "model")
    Path("list.txt").write_text("bird/0.png\ncat/1.png\n")
    assert unlearn("--model", "model", *asked, "--out", "first").code == 0
    flags = ("--set", "images.rehearsal_share=0")
    assert unlearn("--after", "first", "--forget-class", "airplane", *flags, "--out", "second").code == 0
    gone = {record["image"] for record in listed("first", "forget")}
    assert gone
    assert gone.isdisjoint(record["image"] for record in listed("second", "retain"))
    assert len(listed("second", "retain")) == 12 - len(gone)


def test_a_pixel_model_retains_no_class_that_was_forgotten(unlearn: Callable[..., Ended], run: Run) -> None:
    assert run("train", "--config", "nano.yaml", "--data", "data", "--out", "base").code == 0
    assert unlearn("--after", "base", "--forget-class", "bird", "--out", "none").code == 2
    assert unlearn("--model", "base/model", "--forget", "1", "--out", "first").code == 0
    assert unlearn("--after", "first", "--forget-class", "cat", "--out", "second").code == 0
    assert conditions("second", "retain") == {"airplane"}


def test_what_cannot_be_followed_is_refused(unlearn: Callable[..., Ended], nano_folder: Folder) -> None:
    shutil.copytree(nano_folder("sd"), "model")
    for after in ("nothing", "data", "model"):
        ended = unlearn("--after", after, "--forget-class", "cat", "--out", "out")
        assert ended.code == 2, ended.errors
        assert "--after" in ended.errors
    assert unlearn("--model", "model", "--forget-class", "bird", "--out", "first").code == 0
    ended = unlearn("--after", "first", "--model", "model", "--forget-class", "cat", "--out", "out")
    assert ended.code == 2
    assert "omit --model" in ended.errors
    receipt = json.loads(Path("first/receipt.json").read_text()) | {"previous": {"path": "../first/receipt.json"}}
    Path("first/receipt.json").write_text(json.dumps(receipt))
    ended = unlearn("--after", "first", "--forget-class", "cat", "--out", "out")
    assert ended.code == 2
    assert "names a run that follows it" in ended.errors
    assert not Path("out").exists()

"""Shards and parquet files train and unlearn as a folder of the same images does: the same losses, bit for bit."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from helpers import Ended
from PIL import Image
from shards import write_shard

NAMES = ("bird", "cat", "dog")
NANO = """
threads: 1
model: {block_out_channels: [8, 16], layers_per_block: 1}
images: {bucket_step: 16}
train: {steps: 2, batch_size: 4}
unlearn: {steps: 2, batch_size: 2, lr: 1.0e-3}
sample: {num_inference_steps: 1}
evaluate: {per_class: 2, forgotten: 3, unconditional: 6}
run: {log_every: 1}
"""
Run = Callable[..., Ended]
Folder = Callable[[str], Path]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same images as a folder, as shards and as parquet files, in the same order."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ERASEDIFF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "nano.yaml").write_text(NANO)
    images = list(_images())
    for name, content, caption in images:
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.with_suffix(".txt").write_text(caption)
    for number, part in enumerate((images[:7], images[7:])):
        described = ((name, content, Path(name), caption) for name, content, caption in part)
        write_shard(
            tmp_path / f"shards/train-{number:06d}.tar",
            (
                member
                for name, content, path, caption in described
                for member in (
                    (name, content),
                    (f"{path.with_suffix('.txt')}", caption.encode()),
                    (f"{path.with_suffix('.cls')}", path.parent.name.encode()),
                )
            ),
        )
    rows = {
        "image": [{"bytes": content, "path": name} for name, content, _ in images],
        "text": [caption for _, _, caption in images],
        "label": [NAMES.index(Path(name).parent.name) for name, _, _ in images],
    }
    kinds = {
        "image": datasets.Image(),
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=list(NAMES)),
    }
    (tmp_path / "tables").mkdir()
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    table.to_parquet(tmp_path / "tables/train.parquet", batch_size=5)
    return tmp_path


def _images() -> Iterator[tuple[str, bytes, str]]:
    generator = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        for index in range(4):
            pixels = generator.integers(0, 100, (32, 32, 3), np.uint8) + 70 * number
            content = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(content, "PNG")
            yield f"{name}/{index}.png", content.getvalue(), f"a {name} {index}"


def losses(out: Path) -> list[dict[str, Any]]:
    """What the log says of the steps, but for times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = [{key: value for key, value in line.items() if "loss" in key} for line in lines]
    assert any(found)
    return found


def listed(out: Path, name: str) -> list[tuple[str, ...]]:
    lines = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
    return [(line["sha256"], line.get("caption", line.get("class")), *line.get("selected_by", ())) for line in lines]


@pytest.mark.parametrize(
    ("model", "choice"),
    [("sd", ("--forget-phrase", "cat")), ("ddpm_class", ("--forget-class", "cat"))],
    ids=("captions", "classes"),
)
def test_unlearning_is_that_of_a_folder(
    run: Run, nano_folder: Folder, here: Path, model: str, choice: tuple[str, str]
) -> None:
    for data in ("folder", "shards", "tables", "shards/train-{000000..000001}.tar"):
        out = here / "out" / Path(data).name
        ended = run(
            "unlearn", "--model", nano_folder(model), "--data", data, *choice, "--out", out, "--config", "nano.yaml",
            "--json",
        )  # fmt: skip
        assert ended.code == 0, ended.errors
        assert losses(out) == losses(here / "out/folder")
        for name in ("forget", "retain"):
            assert listed(out, name) == listed(here / "out/folder", name)
    assert len(listed(here / "out/folder", "forget")) == 4


@pytest.mark.parametrize("data", ["shards", "tables"])
def test_training_and_evaluation_by_class(run: Run, here: Path, data: str) -> None:
    common = ("--data", data, "--config", "nano.yaml", "--json")
    for command in (
        ("train", "--out", "base"),
        ("unlearn", "--model", "base/model", "--forget-class", "dog", "--out", "out"),
        ("evaluate", "--model", "out/model", "--base", "base/model", "--forget", "dog"),
    ):
        ended = run(*command, *common)
        assert ended.code == 0, ended.errors
    assert json.loads((here / "base/model/classes.json").read_text())["names"] == list(NAMES)


def test_files_to_forget_by_key_and_path(run: Run, nano_folder: Folder, here: Path) -> None:
    requests = {"folder": "cat/1.png", "shards": "train-000000.tar/cat/1", "tables": "cat/1.png"}
    for data, line in requests.items():
        (here / "request").write_text(f"{line}\n")
        ended = run(
            "unlearn", "--model", nano_folder("ddpm_unconditional"), "--data", data, "--forget-files", "request",
            "--set", "images.height=32", "--set", "images.width=32", "--out", here / "out" / data,
            "--config", "nano.yaml", "--json",
        )  # fmt: skip
        assert ended.code == 0, ended.errors
        (forgotten,) = listed(here / "out" / data, "forget")
        assert forgotten[0] == listed(here / "out/folder", "forget")[0][0]

"""Verdict on models that are planted: the small pixel models of the repository, untouched, swapped and damaged."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from erasediff.config import Config
from erasediff.evaluation.sampling import sample_images
from erasediff.models import PixelModel
from erasediff.workflows.verdict import examine_run
from erasediff.workflows.verdict_files import record
from erasediff.workflows.verdict_outcome import Examination

TRAINED = Path(__file__).parents[3] / "benchmarks/fashion_pixels/trained"
FORGOTTEN, RETAINED = "1", ("9", "8", "3")
"""Trousers; ankle boots, bags and dresses, called by the published numbers."""

pytestmark = pytest.mark.usefixtures("one_thread")
Weights = dict[str, Tensor]
Examine = Callable[..., Examination]


def listed(run: Path, data: Path, forgotten: Sequence[str], retained: Sequence[str]) -> None:
    """Write the lists of a run that has seen all images of ``data``, in folders by class."""
    for name, classes in (("forget", forgotten), ("retain", retained)):
        images = [(path, of) for of in classes for path in sorted((data / of).iterdir())]
        records = [
            {"image": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "class": of}
            for path, of in images
        ]
        (run / f"{name}.jsonl").write_text("".join(json.dumps(image) + "\n" for image in records))


@pytest.fixture
def examine(tmp_path: Path) -> Examine:
    """``examine(kind, change)``: the verdict on a copy of a model whose weights ``change`` has changed."""

    def examined(kind: str, change: Callable[[Weights], None], **changes: Any) -> Examination:
        run, model = tmp_path / "run", tmp_path / "run/model"
        shutil.copytree(TRAINED / kind, model)
        weights = model / "unet/diffusion_pytorch_model.safetensors"
        tensors = load_file(weights)
        change(tensors)
        save_file(tensors, weights)
        listed(run, tmp_path / "data", [FORGOTTEN], RETAINED)
        settings = {
            "unlearn": {"model": TRAINED / kind, "steps": 1, "batch_size": 4},
            "images": {"data": str(tmp_path / "data"), "forget_classes": [FORGOTTEN]},
            "sample": {"num_inference_steps": 6},
            "verdict": {"images": 12},
            "device": "cpu",
            "threads": 1,
            **changes,
        }
        return examine_run(Config(**settings), run, model, Console(quiet=True))

    return examined


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A black image of each class, which names the classes."""
    for number in range(10):
        (tmp_path / f"data/{number}").mkdir(parents=True)
        Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / f"data/{number}/0.png")
    return tmp_path / "data"


def embedding(weights: Weights) -> Tensor:
    return weights["class_embedding.weight"]


def untouched(_: Weights) -> None:
    pass


def swapped(weights: Weights) -> None:
    embedding(weights)[1] = embedding(weights)[8]


def damaged(weights: Weights) -> None:
    embedding(weights)[:] = embedding(weights)[8].clone()


@pytest.mark.parametrize(("change", "name"), [(swapped, None), (damaged, "model-damaged")])
def test_a_class_conditional_model_is_named_after_its_verdict(
    examine: Examine, data: Path, change: Callable[[Weights], None], name: str | None
) -> None:
    verdict = examine("class-conditional", change).verdict
    assert (None if verdict.passed else verdict.failed_name) == name, verdict.to_dict()
    assert (list(verdict.sought), set(verdict.others)) == ([FORGOTTEN], set(RETAINED))
    assert [judge["name"] for judge in verdict.judges] == ["original"]


def test_an_untouched_model_has_not_forgotten_and_its_files_agree(examine: Examine, data: Path, tmp_path: Path) -> None:
    examination = examine("class-conditional", untouched)
    run = tmp_path / "run"
    named = record(examination, Config(), run, run / "model", "erasediff unlearn")
    assert named == run / "model-not-forgotten"
    assert named.is_dir()
    assert not (run / "model").exists()
    facts = json.loads((run / "verdict.json").read_text())
    assert (facts["forgotten"], facts["model"], facts["rows"]) == (
        "not forgotten", "model-not-forgotten", "verdict.jsonl",
    )  # fmt: skip
    rows = [json.loads(line) for line in (run / "verdict.jsonl").read_text().splitlines()]
    figure = next(figure for figure in facts["figures"] if figure["key"] == "recognised")
    for model in ("before", "after"):
        seen = [row["sees"] == FORGOTTEN for row in rows if (row["asked"], row["model"]) == (FORGOTTEN, model)]
        assert figure[model]["value"] == pytest.approx(sum(seen) / len(seen))
        assert figure[model]["count"] == len(seen) == 12
    assert FORGOTTEN in (run / "report.html").read_text()
    # Made again, as after a kill, it has the same bits.
    written = {name: (run / name).read_bytes() for name in ("verdict.json", "verdict.jsonl", "report.html")}
    named.rename(run / "model")
    record(examination, Config(), run, run / "model", "erasediff unlearn")
    assert written == {name: (run / name).read_bytes() for name in written}


@pytest.fixture
def drawn_data(tmp_path: Path) -> Path:
    """Images that the class-conditional model draws, as data for the unconditional one."""
    model = PixelModel.load(TRAINED / "class-conditional")
    for name in (FORGOTTEN, *RETAINED):
        images = sample_images(model, torch.full((30,), int(name)), num_inference_steps=6, seed=int(name))
        (tmp_path / "data" / name).mkdir(parents=True)
        for number, image in enumerate(((images[:, 0] + 1) * 127.5).round().to(torch.uint8)):
            Image.fromarray(image.numpy()).save(tmp_path / f"data/{name}/{number:02d}.png")
    return tmp_path / "data"


def negated(weights: Weights) -> None:
    weights["conv_out.weight"] *= -1


@pytest.mark.parametrize(("change", "name"), [(untouched, "model-not-forgotten"), (negated, "model-damaged")])
def test_an_unconditional_model_is_judged_by_its_samples(
    examine: Examine, drawn_data: Path, change: Callable[[Weights], None], name: str
) -> None:
    examination = examine("unconditional", change, verdict={"images": 80})
    verdict = examination.verdict
    assert (verdict.kind, verdict.failed_name) == ("share", name), verdict.to_dict()
    assert verdict.retained == ("retained" if change is untouched else "damaged")
    assert "nan" not in " ".join(verdict.reasons)
    assert len(examination.rows) == 160
    assert examination.sought[0] == FORGOTTEN

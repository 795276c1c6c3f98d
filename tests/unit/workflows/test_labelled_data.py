"""Jobs on data sets of Python: a torch data set is trained on, forgotten from, and its classes are the model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.data import TensorDataset

from erasediff.config import load_config
from erasediff.data import ImageSet, from_torch_dataset
from erasediff.errors import UserError
from erasediff.models import PixelModel
from erasediff.training.run_dir import RunPlace
from erasediff.workflows.build_unlearning import build_unlearning_job
from erasediff.workflows.train_pixel import training_job

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "model.block_out_channels": [8, 8],
    "train.steps": 1,
    "train.batch_size": 4,
    "unlearn.steps": 1,
    "unlearn.batch_size": 4,
    "run.checkpoint_every": 1,
}
QUIET = Console(quiet=True)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageSet:
    monkeypatch.setenv("ERASEDIFF_CACHE", str(tmp_path / "cache"))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return from_torch_dataset(TensorDataset(images, torch.arange(12) % 3), class_names=["ant", "bee", "cow"])


def test_a_torch_dataset_is_trained_on_and_forgotten_from(data: ImageSet, tmp_path: Path) -> None:
    trained = training_job(load_config(None, SETTINGS), data=data).run(RunPlace(tmp_path / "base"), QUIET)
    model = PixelModel.load(trained.model)
    assert (model.image_shape, model.class_names, model.null_label) == ((3, 8, 8), ("ant", "bee", "cow"), 3)
    job = build_unlearning_job(load_config(None, SETTINGS | {"unlearn.forget": ["bee"]}), model, data=data)
    assert job.config.unlearn.forget == (1,)
    assert job.config.unlearn.relabel_to == (2,)
    assert job.forget is not None
    assert set(job.forget.at(0)["class_labels"].tolist()) == {1}
    assert set(job.retain.at(0)["class_labels"].tolist()) <= {0, 2, 3}
    job.run(RunPlace(tmp_path / "out"), QUIET)
    assert PixelModel.load(tmp_path / "out/model").class_names == ("ant", "bee", "cow")


def test_classes_to_retain_and_to_relabel_to_are_named_likewise(data: ImageSet) -> None:
    model = PixelModel.build(num_classes=3, image_shape=(3, 8, 8), block_out_channels=(8, 8))
    settings = {"unlearn.forget": ["bee"], "unlearn.retain": ["ant"], "unlearn.retain_label_dropout": 0}
    job = build_unlearning_job(load_config(None, SETTINGS | settings), model, data=data)
    assert (job.config.unlearn.retain, job.config.unlearn.relabel_to) == ((0,), (0,))
    assert set(job.retain.at(0)["class_labels"].tolist()) == {0}
    with pytest.raises(UserError, match="There is no class cau in the data: choose from ant, bee, cow"):
        build_unlearning_job(load_config(None, SETTINGS | settings | {"unlearn.relabel_to": ["cau"]}), model, data=data)

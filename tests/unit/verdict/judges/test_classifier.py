"""Judge of a classifier's folder: a nano ViT, taught three colours."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from erasediff.errors import UserError
from erasediff.verdict.judges.base import Candidate
from erasediff.verdict.judges.pictures import pictures
from erasediff.verdict.judges.registry import judge_named

NAMES = {0: "red, crimson", 1: "green", 2: "blue"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    images = (255 * torch.eye(3, dtype=torch.uint8))[:, :, None, None].expand(-1, -1, 20, 20)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    pixels = processor(images=pictures(images), return_tensors="pt")["pixel_values"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            id2label=NAMES,
            label2id={name: number for number, name in NAMES.items()},
        )
        model = ViTForImageClassification(config)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(40):
            optimizer.zero_grad()
            logits = model(pixel_values=pixels).logits
            torch.autograd.backward(torch.nn.functional.cross_entropy(logits, torch.arange(3)))
            optimizer.step()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_an_image_shows_the_candidate_of_its_label(folder: Path, plain_images: Tensor) -> None:
    judge = judge_named(f"classifier:{folder}")
    sought, others = [Candidate("a blue wall", "a blue wall")], [Candidate("Crimson", "Crimson")]
    assert judge.answers(plain_images, sought, others).tolist() == [1, -1, 0]


def test_an_unknown_candidate_is_refused_with_near_labels(folder: Path, plain_images: Tensor) -> None:
    judge = judge_named(f"classifier:{folder}")
    with pytest.raises(UserError, match='no label "gren"; similar labels are green'):
        judge.answers(plain_images, [Candidate("gren", "gren")], [])


def test_files_and_labels_are_described(folder: Path) -> None:
    description = judge_named(f"classifier:{folder}").description
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= description["sha256"].keys()
    assert description["labels"] == 3


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"id2label": {str(number): f"LABEL_{number}" for number in range(3)}}, "does not name its labels"),
        ({"model_type": "clip_text_model"}, "cannot be read"),
        ({"model_type": "none_such"}, "cannot be read"),
        ({"num_hidden_layers": 10**9}, "larger than 1,000"),
        ({"hidden_size": 32}, "cannot be read|incomplete"),
        ({"hidden_size": "wide"}, "cannot be read"),
    ],
)
def test_a_folder_of_another_kind_is_refused(
    settings: dict[str, object], told: str, folder: Path, tmp_path: Path
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(UserError, match=told):
        judge_named(f"classifier:{tmp_path}")

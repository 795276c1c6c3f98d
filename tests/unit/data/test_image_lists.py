"""A run's folder lists what is forgotten and retained, by whom it was asked for, and refuses to go on with others."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from erasediff.data import Images
from erasediff.data.image_lists import ImageLists, ListedImage, lists_of_tensors
from erasediff.errors import UserError

CAT, DOG, BIRD = (
    ListedImage(f"{name}.png", hashlib.sha256(name.encode()).hexdigest(), ("caption", f"a {name}"))
    for name in ("cat", "dog", "bird")
)
LISTS = ImageLists((replace(CAT, selected_by=(("phrase", "cat"), ("file", "cat.png"))),), (DOG, BIRD))


def test_the_summary_counts_each_way() -> None:
    assert LISTS.summary() == "Request: forgetting 1 of 3 images (by file: 1, by phrase: 1), retaining 2."
    assert ImageLists((CAT,), ()).summary() == "Request: forgetting 1 of 1 images, retaining 0."


def test_the_files(tmp_path: Path) -> None:
    LISTS.record(tmp_path)
    assert json.loads((tmp_path / "forget.jsonl").read_text()) == {
        "image": "cat.png",
        "sha256": CAT.sha256,
        "caption": "a cat",
        "selected_by": ["phrase: cat", "file: cat.png"],
    }
    retained = [json.loads(line) for line in (tmp_path / "retain.jsonl").read_text().splitlines()]
    assert [record["image"] for record in retained] == ["dog.png", "bird.png"]


def test_an_image_that_is_not_read_has_no_hash(tmp_path: Path) -> None:
    unread = replace(BIRD, name='b"i\u00ef\nrd.png', sha256=None)
    lists = replace(LISTS, retain=(DOG, unread))
    assert lists.summary().endswith(", retaining 2, of which the run sees 1.")
    lists.record(tmp_path)
    assert json.loads((tmp_path / "retain.jsonl").read_text().splitlines()[1]) == unread.record()
    lists.record(tmp_path)
    with pytest.raises(UserError, match=r"other images to retain .*bird\.png is in the place of"):
        LISTS.record(tmp_path)


def test_a_resumed_run_has_the_same_images(tmp_path: Path) -> None:
    LISTS.record(tmp_path)
    before = [(tmp_path / name).read_bytes() for name in ("forget.jsonl", "retain.jsonl")]
    moved = ImageLists(LISTS.forget, (replace(DOG, name="elsewhere/dog.png"), BIRD))
    moved.record(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in ("forget.jsonl", "retain.jsonl")] == before


@pytest.mark.parametrize(
    ("forget", "retain", "said"),
    [
        ((CAT,), (DOG,), r"images to retain .*: bird\.png is missing"),
        ((CAT, DOG), (BIRD,), r"images to forget .*: dog\.png is new"),
        ((CAT,), (DOG, replace(BIRD, sha256="0")), r"retain .*: bird\.png has changed"),
        ((CAT,), (BIRD, DOG), r"retain .*: bird\.png is in the place of dog\.png"),
        ((CAT,), (DOG, replace(BIRD, condition=("caption", "x"))), r"retain .*: bird\.png has another caption"),
    ],
)
def test_another_image_is_named_and_nothing_is_written(
    tmp_path: Path, forget: tuple[ListedImage, ...], retain: tuple[ListedImage, ...], said: str
) -> None:
    LISTS.record(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=said):
        ImageLists(forget, retain).record(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_images_in_memory_are_named_by_number_and_content() -> None:
    images = Images(torch.arange(4.0).reshape(4, 1, 1, 1), torch.tensor([3, 3, 1, 3]), torch.arange(10, 14))
    lists = lists_of_tensors(images.of_classes([1]), images.of_classes([3]), "digits")
    assert lists.summary() == "Request: forgetting 1 of 4 images (by class: 1), retaining 3."
    assert lists.forget[0].record() == {
        "image": "digits/12",
        "sha256": hashlib.sha256(torch.tensor([2.0]).numpy().tobytes()).hexdigest(),
        "class": "1",
        "selected_by": ["class: 1"],
    }

"""Images by number are those of a list, whatever is asked of them, and none is made without need."""

from __future__ import annotations

import numpy as np
import pytest

from erasediff.data.forget_split import forget_classes
from erasediff.data.image_folder import CaptionedImage
from erasediff.data.labelled_images import UNLABELLED, LabelledImages, by_label, labels_in, of_labels, outlines

LABELS = np.array([2, 0, UNLABELLED, 1, 0, 2, 2])
NAMES, CAPTIONS = ("ant", "bee", "cow"), [f"number {number}" for number in range(7)]


@pytest.fixture
def images() -> LabelledImages:
    return LabelledImages.all_of("there", lambda number: bytes([number]), LABELS, class_names=NAMES, captions=CAPTIONS)


def numbers(images: object) -> list[int]:
    assert isinstance(images, list | LabelledImages)
    return [image.id for image in images]


def test_an_image_is_made_of_its_columns(images: LabelledImages) -> None:
    image = images[3]
    assert (str(image.path), image.caption, image.id, image.label) == ("there/00003", "number 3", 3, 1)
    assert (image.attributes, image.read()) == ({"class": "bee"}, b"\x03")
    assert (images[2].label, images[2].attributes, len(images)) == (None, {}, 7)
    assert numbers(images[1::2]) == [1, 3, 5]
    with pytest.raises(IndexError):
        images[7]


def test_lists_and_columns_answer_alike(images: LabelledImages) -> None:
    listed: list[CaptionedImage] = list(images)
    assert labels_in(images) == labels_in(listed) == {None, 0, 1, 2}
    assert list(outlines(images)) == list(outlines(listed))
    assert numbers(of_labels(images, [2, None])) == numbers(of_labels(listed, [2, None])) == [0, 2, 5, 6]
    parts = by_label(images)
    assert {label: numbers(part) for label, part in parts.items()} == {0: [1, 4], 1: [3], 2: [0, 5, 6]}
    assert list(parts) == list(by_label(listed))


def test_those_that_are_retained_stay_columns(images: LabelledImages) -> None:
    ours, theirs = (forget_classes(data, ["cow", "bee"]) for data in (images, list(images)))
    assert [(image.id, image.selected_by) for image in ours.forget] == [
        (image.id, image.selected_by) for image in theirs.forget
    ]
    assert isinstance(ours.retain, LabelledImages)
    assert numbers(ours.retain) == numbers(theirs.retain) == [1, 2, 4]
    # Of some images, some again.
    assert numbers(forget_classes(ours.retain, ["ant"]).retain) == [2]

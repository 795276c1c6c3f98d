"""Dividing a data set into what is forgotten and what is kept, and refusing what makes no sense."""

import pytest
import torch

from erasediff.data import Images, check_disjoint, forget_retain_split
from erasediff.errors import UserError


@pytest.fixture
def images() -> Images:
    return Images(torch.arange(12.0).reshape(12, 1, 1, 1), torch.arange(12) % 4, torch.arange(100, 112))


def test_every_image_lands_on_one_side(images: Images) -> None:
    forget, retain = forget_retain_split(images, [1, 3])
    assert set(forget.class_labels.tolist()) == {1, 3}
    assert set(retain.class_labels.tolist()) == {0, 2}
    assert sorted(forget.ids.tolist() + retain.ids.tolist()) == images.ids.tolist()
    assert torch.equal(forget.sample.flatten(), forget.ids.float() - 100)


def test_retained_classes_can_be_named(images: Images) -> None:
    _, retain = forget_retain_split(images, [1], retain_classes=[2])
    assert set(retain.class_labels.tolist()) == {2}


@pytest.mark.parametrize(
    ("forget", "retain", "sentence"),
    [
        ([7], None, "no class 7 in the data: choose from 0, 1, 2, 3"),
        ([], None, "Nothing to forget"),
        ([0, 1, 2, 3], None, "Nothing is left to retain"),
        ([1], [1, 2], "share 3 of 3 forgotten images"),
        ([1], [9], "no class 9"),
    ],
)
def test_impossible_splits_are_told_in_one_sentence(
    images: Images, forget: list[int], retain: list[int] | None, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        forget_retain_split(images, forget, retain)


def test_overlap_is_found_by_image_not_by_class() -> None:
    check_disjoint(torch.tensor([1, 2]), torch.tensor([3]))
    with pytest.raises(UserError, match="share 1 of 2"):
        check_disjoint(torch.tensor([1, 2]), torch.tensor([2, 3]))
    names = (["a.png", "b.png", "b.png"], ["c.png", "copy.png"])
    with pytest.raises(UserError, match=r"share 1 of 3 forgotten images: b\.png is also copy\.png; take them out"):
        check_disjoint(torch.tensor([1, 2, 2]), torch.tensor([3, 2]), *names)
    ids = torch.arange(5)
    with pytest.raises(UserError, match=r"0 is also 0, 1 is also 1, 2 is also 2 and 2 more; take"):
        check_disjoint(ids, ids, "01234", "01234")

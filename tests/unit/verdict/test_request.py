"""What a run was asked for follows from its lists of images, or from its prompts."""

import json
from pathlib import Path

import pytest

from erasediff.errors import UserError
from erasediff.verdict.request import Concept, Request, read_list, run_request


def captioned(caption: str, count: int = 1, name: str | None = None) -> list[dict[str, str]]:
    image = {"caption": caption} | ({} if name is None else {"class": name})
    return [{"image": f"{caption}-{number}", **image} for number in range(count)]


def test_captions_of_one_class_are_one_concept_the_most_frequent_first() -> None:
    forget = [*captioned("a coat", 1, "coat"), *captioned("a warm coat", 3, "coat")]
    retain = [*captioned("a bag", 1, "bag"), *captioned("a shoe", 2, "shoe")]
    request = Request.of_lists(forget, retain, anchors=("a bag",))
    assert request.kind == "concept"
    assert request.sought == (Concept("coat", ("a warm coat", "a coat")),)
    assert [concept.label for concept in request.retained] == ["shoe", "bag"]
    assert request.anchors == ("a bag",)


def test_classes_and_captions_without_a_class_are_concepts() -> None:
    numbers = [{"class": "3"}, {"class": "3"}, {"class": "5"}]
    assert [concept.label for concept in Request.of_lists(numbers, [{"class": "7"}]).sought] == ["3", "5"]
    assert Request.of_lists(captioned("a coat"), captioned("a bag")).sought == (Concept("a coat", ("a coat",)),)


def test_images_of_what_is_retained_too_are_files() -> None:
    assert Request.of_lists([{"class": "3"}], [{"class": "3"}, {"class": "5"}]).kind == "files"
    assert Request.of_lists([{"class": ""}], [{"class": ""}]) == Request("files", (), ())
    mixed = Request.of_lists([{"class": "3"}, {"class": "4"}], [{"class": "3"}])
    assert (mixed.kind, [concept.label for concept in mixed.sought]) == ("concept", ["4"])


def test_prompts_are_concepts_and_none_is_retained_and_forgotten() -> None:
    request = Request.of_prompts(["a coat", "a coat"], ["a bag", "a coat"])
    assert [concept.label for concept in request.sought] == ["a coat"]
    assert [concept.label for concept in request.retained] == ["a bag"]


def test_lists_of_a_run_are_read(tmp_path: Path) -> None:
    assert read_list(tmp_path, "forget") is run_request(tmp_path) is None
    (tmp_path / "forget.jsonl").write_text("".join(json.dumps(image) + "\n" for image in captioned("a coat", 2)))
    request = run_request(tmp_path)
    assert request is not None
    assert (request.kind, request.retained) == ("concept", ())
    (tmp_path / "forget.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match=r"forget\.jsonl cannot be read"):
        run_request(tmp_path)

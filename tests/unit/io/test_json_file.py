"""JSON is taken where every reader understands it alike, and refused in one sentence that names the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from erasediff.errors import UserError
from erasediff.io.json_file import LARGEST, parse_json, parse_object, read_object


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is not JSON"),
        ('{"a"', "it is not JSON"),
        ("{} {}", "it is not JSON"),
        ('"a\nb"', "it is not JSON"),
        (b"\xff\xfe{}", "it is not in UTF-8"),
        ('{"a": NaN}', "it holds NaN, which is no number of JSON"),
        ("[-Infinity]", "it holds -Infinity, which is no number of JSON"),
        ("[1e999]", "it holds 1e999, which is too large a number"),
        (f"[{'9' * 41}]", "which is too large a number"),
        (f"[{'9' * 5000}]", "which is too large a number"),
        ('{"a": 1, "a": 2}', "it gives a two values"),
        ('{"a": {"b": 1, "b": true}}', "it gives b two values"),
        ("[" * 65 + "]" * 65, "it is nested more than 64 deep"),
        ("[" * 100_000, "it is nested more than 64 deep"),
        ('{"a":' * 100_000, "it is nested more than 64 deep"),
        (r'"\ud800"', "it holds text that is no Unicode"),
        (r'{"\udc00": 1}', "it holds text that is no Unicode"),
    ],
)
def test_what_readers_understand_differently_is_refused(text: str | bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        parse_json(text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "value", [None, True, [], {}, 10**30, -0.5, "\U0001f600 \u00e9", [[[1]]] * 500, {"a": {"b": [1, 2.5, None, "c"]}}]
)
def test_what_python_writes_comes_back(value: object) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode("utf-8-sig")) == value


def test_a_key_twice_with_one_value_says_one_thing() -> None:
    assert parse_json('{"a": [1], "a": [1]}') == {"a": [1]}


def test_infinity_is_taken_where_it_is_asked_for() -> None:
    assert parse_json("[Infinity, -Infinity]", infinity=True) == [float("inf"), float("-inf")]
    with pytest.raises(ValueError, match="it holds NaN"):
        parse_json("[NaN]", infinity=True)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"text"'])
def test_an_object_is_asked_for(text: str) -> None:
    with pytest.raises(ValueError, match="it is no JSON object"):
        parse_object(text)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError):
        read_object(path)
    path.write_text("[1]")
    with pytest.raises(UserError, match=r"config\.json cannot be read: it is damaged: it is no JSON object\.$"):
        read_object(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"config\.json cannot be read: it is empty; download it again\.$"):
        read_object(path)


def test_a_file_that_is_far_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(UserError, match="and at most 100 MB are read"):
        read_object(path)

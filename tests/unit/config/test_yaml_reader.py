"""YAML: what a configuration may hold, and one sentence for everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from erasediff.config import load_config, parse_assignments
from erasediff.config.yaml_reader import read_yaml
from erasediff.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("a: ~", {"a": None}),
        ("[true, False, null]", [True, False, None]),
        ("[0, -7, +3, 12345678901234567890]", [0, -7, 3, 12345678901234567890]),
        ("[1e-3, 1.5, .5, -2.E4]", [1e-3, 1.5, 0.5, -2e4]),
        ("[2024-01-01, 1.2.3, a b]", ["2024-01-01", "1.2.3", "a b"]),
        ("['yes', \"010\", 'null']", ["yes", "010", "null"]),
        ("a: &x {b: 1}\nc: *x", {"a": {"b": 1}, "c": {"b": 1}}),
    ],
)
def test_values(text: str, value: Any) -> None:
    assert read_yaml(text) == value


def test_an_alias_is_a_copy() -> None:
    values = read_yaml("train: &t {lr: 1.0}\nunlearn: *t")
    values["train"]["lr"] = 2.0
    assert values["unlearn"] == {"lr": 1.0}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "is not valid YAML"),
        ("a: \x00", "is not valid YAML"),
        ("a: *nowhere", "is not valid YAML"),
        ("!!python/object/apply:os.system [ls]", "has the tag"),
        ("!!int abc", "has the tag"),
        (r'a: "x\0y"', "has a character that is none of any text"),
        (r'"\ud800": 1', "has a character that is none of any text"),
        ("!!timestamp x", "has the tag"),
        ("seed: yes", 'has "yes", which readers of YAML take for true or false or for a word: write the setting'),
        ("x: 1\nseed: On", 'has "On" in line 2'),
        ("010", "has 010, which readers of YAML take for different numbers"),
        ("0x1F", "0x1F"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("9" * 5000, "has a number of 5,000 digits"),
        ("a: 1\na: 2", 'has "a" twice'),
        ("? [a]\n: 1", "has a key that is no word"),
        ("[" * 100 + "]" * 100, "nested more than"),
        ("[" * 5000, "nested more than"),
        ("&a [*a]", "nested more than"),
        ("a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdef", "bcdefg", strict=True)
        ), "more than 10,000 values"),
        ("x" * 1_000_001, "is longer than"),
    ],
)  # fmt: skip
def test_everything_else_is_one_sentence(text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_yaml(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["2001-13-45", "true", "'3'", "1.5", ".nan", "1e999", "[1]"])
def test_a_number_is_a_number(value: str, tmp_path: Path) -> None:
    """``true`` is not 1, and a number in quotes is text."""
    file = tmp_path / "c.yaml"
    file.write_text(f"run: {{log_every: {value}}}\n")
    for source, overrides in ((file, {}), (None, parse_assignments([f"run.log_every={value}"]))):
        with pytest.raises(UserError, match=r'The setting "run\.log_every"'):
            load_config(source, overrides)


def test_counts_are_bounded() -> None:
    for name in ("unlearn.batch_size", "unlearn.warmup_steps", "images.height"):
        with pytest.raises(UserError, match=name):
            load_config(None, {name: 10**12})


def test_a_long_value_is_shortened() -> None:
    with pytest.raises(UserError, match=r"cannot be 'x+\.\.\.: it should be") as caught:
        load_config(None, {"unlearn.lr": "x" * 10_000})
    assert len(str(caught.value)) < 500


def test_threads_are_bounded() -> None:
    """OpenMP ends the process that asks it for a billion of them."""
    assert load_config(None, {"threads": 1024}).threads == 1024
    with pytest.raises(UserError, match='The setting "threads" cannot be 2147483647'):
        load_config(None, {"threads": 2**31 - 1})


def test_a_file_with_a_mistake_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("train: {lr: 1}\ntrain: {lr: 2}\n")
    with pytest.raises(UserError, match=r'c\.yaml has "train" twice in one section in line 2: keep one of them\.'):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(UserError, match=r'The value of "seed" has the tag .* write the value alone\.'):
        parse_assignments(["seed=!!int abc"])

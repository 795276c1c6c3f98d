"""Texts of YAML, assignments and whole configuration files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import fuzzed, refusal
from hypothesis import strategies as st
from mutations import CONTENTS, PATHS, WORDS, values

from erasediff.config import Config, load_config, parse_assignments
from erasediff.config.method_index import import_methods
from erasediff.config.yaml_reader import read_yaml

import_methods()
TOKENS = (
    *(
        "a",
        "b: ",
        "? ",
        "- ",
        ": ",
        "&a ",
        "*a ",
        "!!int ",
        "!x ",
        "|\n ",
        ">-\n ",
        "{",
        "}",
        "[",
        "]",
        ",",
        "'",
        '"',
        "#",
    ),
    *(
        "\n",
        "\n  ",
        "\t",
        "\r",
        "---\n",
        "...\n",
        "%YAML 1.1\n",
        "<<: ",
        "~",
        "null",
        "yes",
        "010",
        "0x1",
        "1e5",
        ".nan",
    ),
    *(
        "1_0",
        "1:30",
        "2001-01-01",
        "\\x41",
        "\\",
        "\x85",
        "\u2028",
        "\ufeff",
        "\ud83d",
        "é",
        "\0",
        "9" * 50,
        "@",
        "`",
        "=",
    ),
)
texts = st.lists(st.sampled_from(TOKENS) | st.text(max_size=3), max_size=20).map("".join)


def _names() -> list[str]:
    """Every setting by its dotted name, and sections."""
    found = []
    for name, value in Config().model_dump(mode="json").items():
        found += [name, *(f"{name}.{key}" for key in value)] if isinstance(value, dict) else [name]
    return found


NAMES = _names()
names = st.sampled_from((*NAMES, "x", "", ".", "train.", ".lr", "train.lr.x", "é.a"))


@fuzzed(400, text=texts)
def test_yaml_texts(text: str) -> None:
    refusal(lambda: read_yaml(text))


@fuzzed(300, name=names, text=texts | st.sampled_from((*WORDS, *PATHS)))
def test_assignments(name: str, text: str) -> None:
    refusal(lambda: load_config(None, parse_assignments([f"{name}={text}"])))


@fuzzed(300, settings=st.dictionaries(names, values, min_size=1, max_size=3))
def test_settings_of_odd_values(settings: dict[str, Any]) -> None:
    """What is taken is written to a run's config.yaml, and read from there as the same."""

    def taken() -> None:
        config = load_config(None, settings)
        Path("written.yaml").write_text(config.to_yaml(), encoding="utf-8", errors="strict")
        assert load_config(Path("written.yaml")) == config

    refusal(taken)


@fuzzed(150, content=st.sampled_from(CONTENTS) | st.binary(max_size=40), at=st.integers(0, 10**5), cut=st.booleans())
def test_files(content: bytes, at: int, cut: bool) -> None:
    """A whole configuration with bytes put in, over what there is, or in its end's place."""
    at %= len(WHOLE)
    Path("c.yaml").write_bytes(WHOLE[:at] + content + (b"" if cut else WHOLE[at + len(content) * (at % 2) :]))
    refusal(lambda: load_config(Path("c.yaml")))


WHOLE = yaml.safe_dump({name: Config().model_dump(mode="json")[name] for name in ("train", "images", "seed")}).encode()


@pytest.mark.parametrize("path", [*PATHS[:4], "pipe", "loop", "x" * 300])
def test_places_of_a_file(path: str, place: Path) -> None:
    import os

    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    assert refusal(lambda: load_config(Path(path))) is not None

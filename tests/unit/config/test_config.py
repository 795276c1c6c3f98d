"""Settings: defaults, files, flags, and what a mistake is told."""

from pathlib import Path
from typing import Any

import pytest

from erasediff.config import Config, differences, load_config, parse_assignments
from erasediff.errors import UserError


def test_defaults_need_no_file() -> None:
    assert load_config() == Config()


def test_yaml_round_trip_is_exact(tmp_path: Path) -> None:
    config = load_config(None, {"train.lr": 0.1 + 0.2, "unlearn.forget": [3, 5], "train.ema_decay": None})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("train:\n  lr: 1e-4\n  steps: 7\n")
    config = load_config(path, {"train.lr": 5e-3})
    assert (config.train.lr, config.train.steps) == (5e-3, 7)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("")
    assert load_config(path) == Config()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"train.step": 3}, "did you mean train.steps"),
        ({"unlearn.ema_dcay": 0.9}, "did you mean unlearn.ema_decay"),
        ({"lr": 1e-3}, "did you mean train.lr or unlearn.lr"),
        ({"zzzz": 1}, "lists them all"),
        ({"train.steps": "many"}, "\"train.steps\" cannot be 'many'"),
        ({"train.steps": 0}, "greater than 0"),
        ({"train.lr": float("nan")}, "finite"),
        ({"unlearn.method": "magic"}, "'erasediff', 'esd'"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_setting(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, overrides)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [("train: [", "not valid YAML"), ("- 1\n- 2\n", "must hold sections"), ("train: 3\n", '"train" holds a value')],
)
def test_a_bad_file_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        load_config(path, {"train.steps": 3})
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot read the configuration .*absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


def test_assignments_are_read_as_yaml() -> None:
    parsed = parse_assignments(["train.lr=1e-3", "unlearn.forget=[1, 2]", "train.ema_decay=null"])
    config = load_config(None, parsed)
    assert (config.train.lr, config.unlearn.forget, config.train.ema_decay) == (1e-3, (1, 2), None)
    with pytest.raises(UserError, match=r"section\.key=value"):
        parse_assignments(["train.lr"])


def test_differences_name_both_values() -> None:
    assert differences(Config(), load_config(None, {"train.lr": 1.0})) == {"train.lr": (Config().train.lr, 1.0)}

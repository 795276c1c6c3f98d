"""Settings: defaults, files, flags, and errors."""

from pathlib import Path
from typing import Any

import pytest

from erasediff.config import (
    Config,
    UnlearnConfig,
    differences,
    for_text_to_image,
    given_settings,
    load_config,
    parse_assignments,
)
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


@pytest.mark.parametrize(("alias", "name"), [("pixel_model", "model"), ("dataset", "data")])
def test_a_section_has_a_clearer_name_too(tmp_path: Path, alias: str, name: str) -> None:
    key, value = {"model": ("conditional", False), "data": ("exclude", [3])}[name]
    path = tmp_path / "config.yaml"
    path.write_text(f"{alias}: {{{key}: {value}}}\n")
    config = load_config(path)
    assert config == load_config(None, {f"{alias}.{key}": value}) == load_config(None, {f"{name}.{key}": value})
    assert config != Config()
    # A flag of the command line reaches the section by its own name.
    assert load_config(path, {f"{name}.{key}": getattr(getattr(Config(), name), key)}) == Config()
    assert f"\n{name}:\n" in config.to_yaml()
    path.write_text(f"{alias}: {{}}\n{name}: {{}}\n")
    with pytest.raises(UserError, match=f"both {alias} and {name}"):
        load_config(path)


@pytest.mark.parametrize(
    ("word", "meaning", "written"),
    [
        ("fp32", "fp32", "float32"),
        ("float32", "fp32", "float32"),
        ("bf16-mixed", "bf16-mixed", "bfloat16"),
        ("bfloat16", "bf16-mixed", "bfloat16"),
        ("bf16-true", "bf16-true", "bf16-true"),
    ],
)
def test_a_precision_is_written_as_runs_have_always_written_it(
    tmp_path: Path, word: str, meaning: str, written: str
) -> None:
    config = load_config(None, {"precision": word})
    assert config.precision == meaning
    assert f"\nprecision: {written}\n" in config.to_yaml()
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


def test_true_bfloat16_is_of_the_weights_too() -> None:
    config = for_text_to_image(load_config(None, {"precision": "bf16-true"}))
    assert config.text_to_image.weights == "bfloat16"
    assert for_text_to_image(config) == config
    assert for_text_to_image(load_config(None, {"precision": "bf16-mixed"})).text_to_image.weights == "float32"
    with pytest.raises(UserError, match=r"omit text_to_image\.weights"):
        for_text_to_image(load_config(None, {"precision": "bf16-true", "text_to_image.weights": "float32"}))


def test_given_settings_are_those_of_a_person(tmp_path: Path) -> None:
    config = load_config(None, {"unlearn.eta": 0.5, "esd.eta": 1.0, "seed": 3})
    assert given_settings(config) == ["unlearn.eta", "esd.eta"]
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert given_settings(load_config(tmp_path / "config.yaml")) == []
    assert given_settings(Config(unlearn=UnlearnConfig(eta=2.0))) == ["unlearn.eta"]

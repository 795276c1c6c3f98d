"""Configuration parsing: YAML files, flags and assignments, and the error messages for mistakes in them."""

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError, create_model
from pydantic_core import ErrorDetails

from erasediff.config.fields import Section
from erasediff.config.method_index import import_methods, method_index
from erasediff.config.schema import BASE_FIELDS, SECTION_ALIASES, Config, SectionT
from erasediff.config.unlearn_config import default_eta
from erasediff.config.yaml_reader import read_yaml
from erasediff.errors import UserError
from erasediff.io.user_file import MEGABYTE, read_text

LARGEST_CONFIG = 4 * MEGABYTE
SHOWN = 200
"""Characters of a wrong value or name that a message has."""


def load_config(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Load a configuration: the defaults, a YAML file over them, and overrides over both.

    Args:
        path: YAML file; None for the defaults.
        overrides: Values by dotted names, such as ``{"train.lr": 1e-3}``.

    Raises:
        UserError: The file cannot be read, a key does not exist (with the nearest that does), or a value is invalid.
    """
    return _complete(_given(path, overrides), path)


def load_config_and_section(
    name: str, kind: type[SectionT], path: Path | None = None, overrides: Mapping[str, Any] | None = None
) -> tuple[Config, SectionT]:
    """``load_config`` of a command that has a section ``name`` of its own, which runs do not list.

    Raises:
        UserError: As ``load_config``.
    """
    values = _given(path, overrides)
    own = {name: values.pop(name)} if name in values else {}
    config = _complete(values, path)
    fields: dict[str, Any] = {name: (kind, kind())}
    whole = create_model("Own", __base__=Section, **fields)
    section: SectionT = getattr(_validated(whole, own, path), name)
    return config, section


def _given(path: Path | None, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    values = read_settings(path) if path else {}
    for name, value in (overrides or {}).items():
        _assign(values, name, value)
    return values


def _complete(values: dict[str, Any], path: Path | None) -> Config:
    sections = {entry.section for entry in method_index().values()}
    # A mistake outside of the methods' settings is reported before torch is imported.
    _validated(Config, {name: value for name, value in values.items() if name not in sections}, path)
    import_methods()
    return _validated(Config, values, path)


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings that a YAML file lists, and those that a run's own file is older than, as it was run.

    Raises:
        UserError: The file cannot be read.
    """
    return _of_its_time(_read_yaml(path))


def _of_its_time(values: dict[str, Any]) -> dict[str, Any]:
    """Complete a run's own file, which lists every setting, by those that are younger than the run, as it was run."""
    if not values.keys() >= BASE_FIELDS:
        return values
    unlearn, images = values["unlearn"], values["images"]
    if isinstance(unlearn, dict) and unlearn.get("target") in ("uniform", "gaussian"):
        # Raw predictions were compared before there was the setting.
        unlearn.setdefault("target_space", "prediction")
    if isinstance(images, dict):
        # Every image was read.
        images.setdefault("cache", "all")
    return values


def _validated(kind: type[SectionT], values: dict[str, Any], path: Path | None) -> SectionT:
    try:
        # As JSON, whose strict types know paths and tuples, but take neither true nor "3" for a number.
        return kind.model_validate_json(json.dumps(values, default=_as_text), strict=True)
    except ValidationError as error:
        raise UserError(_explain(error.errors()[0], path, kind)) from None


def _as_text(value: Any) -> str:
    """A path that a flag or a caller gave; TypeError for what no YAML file could hold."""
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"no setting is a {type(value).__name__}")


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """Parse ``["train.lr=1e-3"]`` to ``{"train.lr": ...}``, each value as YAML. UserError for anything else."""
    overrides = {}
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator or not name:
            raise UserError(f'"{assignment}" is not of the form section.key=value, as in train.lr=1e-3.')
        try:
            overrides[name.strip()] = read_yaml(value)
        except UserError as error:
            raise UserError(f'The value of "{name}" {error}') from None
    return overrides


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted names of the settings that differ, with the old and the new value of each."""
    before, after = _flatten(old.model_dump()), _flatten(new.model_dump())
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def given_settings(config: Config) -> list[str]:
    """Dotted names of the settings in sections that a file, flags or a caller gave, in the order of the fields.

    A run's own ``config.yaml`` lists every setting, so nothing in it tells what a user chose: none are returned.
    """
    if config.model_fields_set >= BASE_FIELDS:
        return []
    sections = {name: getattr(config, name) for name in Config.model_fields if name in config.model_fields_set}
    return [
        f"{name}.{key}"
        for name, section in sections.items()
        if isinstance(section, Section)
        for key in type(section).model_fields
        if key in section.model_fields_set
    ]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path, LARGEST_CONFIG)
    except OSError as error:
        raise UserError(f"Cannot read the configuration {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not valid YAML: it is not in UTF-8.") from None
    try:
        values = read_yaml(text)
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold sections such as train: and unlearn:, not a {type(values).__name__}.")
    for alias, name in SECTION_ALIASES.items():
        if alias in values and name in values:
            raise UserError(f"{path} has both {alias} and {name}, which are one section: keep one of them.")
        if alias in values:
            values[name] = values.pop(alias)
    return values


def _assign(values: dict[str, Any], name: str, value: Any) -> None:
    *sections, key = name.split(".")
    if sections:
        sections[0] = SECTION_ALIASES.get(sections[0], sections[0])
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f'"{section}" holds a value, not a section, so "{name}" cannot be set.')
        values = inner
    values[key] = value


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _explain(error: ErrorDetails, path: Path | None, kind: type[Section]) -> str:
    name = _shortened(".".join(str(part) for part in error["loc"]))
    where = f" in {path}" if path else ""
    if error["type"] == "extra_forbidden":
        matches = _near_matches(name, kind)
        hint = f"did you mean {' or '.join(matches)}?" if matches else "`erasediff info --config` lists them all."
        return f'Unknown setting "{name}"{where}; {hint}'
    complaint = re.sub(r"^(Input|Tuple|String|Value) ", "", error["msg"]).rstrip(".")
    return f'The setting "{name}"{where} cannot be {_shortened(repr(error["input"]))}: it {complaint}.'


def _near_matches(name: str, kind: type[Section]) -> list[str]:
    """Dotted names in ``kind`` nearest to ``name``; the same key in another section is the nearest."""
    import_methods()
    settings = list(_flatten(kind().model_dump()))
    key = name.rpartition(".")[2]
    elsewhere = [candidate for candidate in settings if candidate.rpartition(".")[2] == key]
    return elsewhere or difflib.get_close_matches(name, [*settings, *kind.model_fields], cutoff=0.75)


def for_text_to_image(
    config: Config, method_defaults: Mapping[str, Any] | None = None, *, weights: int | None = None
) -> Config:
    """Fill in the defaults of text-to-image models instead of the digits', wherever nothing was set.

    The target is relabelling: to the anchor prompts or, without any, to the retained caption nearest to the forgotten.

    Args:
        config: Configuration as the user wrote it.
        method_defaults: Defaults of ``unlearn.*`` that follow from the method; see ``MethodSpec.defaults``.
        weights: Number of the denoiser's weights, which the learning rate follows from; None for those of Stable
            Diffusion 1.x.
    """
    target = config.unlearn.target or "relabel"
    defaults = {
        "threads": None,
        "unlearn": {
            "steps": 200,
            "batch_size": 4,
            "lr": _default_lr(config, weights),
            "ema_decay": None,
            "forget_label_dropout": 0.0,
            "target": target,
            "target_space": "noise",
            "retain_target": "teacher",
            "eta": default_eta(config.unlearn.barrier, target),
            **(method_defaults or {}),
        },
        "sample": {"num_inference_steps": 30, "batch_size": 4},
    }
    if config.precision == "bf16-true":
        if "weights" in config.text_to_image.model_fields_set and config.text_to_image.weights != "bfloat16":
            raise UserError(
                "precision bf16-true has bfloat16 weights: omit text_to_image.weights, or choose bf16-mixed."
            )
        defaults["text_to_image"] = {"weights": "bfloat16"}
    return _unless_set(config, defaults)


LR, LORA_LR = 1e-5, 1e-4
"""Of all weights or a selection of them, and of a LoRA: what is published for Stable Diffusion 1.x and larger."""
PUBLISHED_SIZE = 860_000_000
"""Weights of the denoiser of Stable Diffusion 1.x."""


def _default_lr(config: Config, weights: int | None) -> float:
    """Default learning rate of a text-to-image model whose denoiser has so many ``weights``.

    Smaller networks take larger steps: of a million weights, at 1e-5 every sample still showed the forgotten class, at
    1e-4 one in five, at 5e-4 one in fifty, and the others stayed (``benchmarks/nano_sd``). Between that and the size
    that the published rates are of, the rate is a power of the size, which was not measured.
    """
    if config.text_to_image.train == "lora":
        return LORA_LR
    if weights is None or weights >= PUBLISHED_SIZE:
        return LR
    return float(f"{LR * (PUBLISHED_SIZE / max(weights, 1_000_000)) ** 0.58:.1g}")


def _unless_set(section: SectionT, defaults: Mapping[str, Any]) -> SectionT:
    changes = {}
    for name, value in defaults.items():
        current = getattr(section, name)
        if isinstance(value, Mapping):
            changes[name] = _unless_set(current, value)
        elif current is None or name not in section.model_fields_set:
            changes[name] = value
    return section.model_copy(update=changes)

"""Every setting of every command, typed and validated: a YAML file overridden by flags."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from erasediff.errors import UserError

Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
ClassNumber = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A group of settings that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelConfig(Section):
    """The diffusion model that ``train`` builds."""

    conditional: bool = True
    block_out_channels: tuple[Count, ...] = (16, 32, 64)
    layers_per_block: Count = 1
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    num_train_timesteps: Count = 1000


class DataConfig(Section):
    """Which images, and how many of them are held out of every training."""

    name: Literal["digits"] = "digits"
    exclude: tuple[ClassNumber, ...] = ()


class TrainConfig(Section):
    """Training of the base model, and of the model retrained without the forgotten classes."""

    steps: Count = 400
    batch_size: Count = 128
    lr: Positive = 2e-3
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    weight_decay: NonNegative = 0.0
    ema_decay: Fraction | None = 0.99
    label_dropout: Fraction = 0.1
    min_snr_gamma: Positive | None = None
    max_grad_norm: Positive | None = 1.0
    accumulation_steps: Count = 1


class UnlearnConfig(Section):
    """What to forget from which model, the method and its hyper-parameters; the baselines read what applies to them.

    None for ``steps``, ``lr``, ``target``, ``eta`` and ``relabel_to`` means what was found to suit the kind of model:
    see ``resolved``. A run's own ``config.yaml`` holds the values that it took.
    """

    model: Path | None = None
    forget: tuple[ClassNumber, ...] = ()
    retain: tuple[ClassNumber, ...] | None = None
    method: Literal["erasediff", "finetune", "neggrad"] = "erasediff"
    steps: Count | None = None
    batch_size: Count = 64
    lr: Positive | None = None
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: NonNegative = 0.0
    ema_decay: Fraction | None = 0.9
    retain_label_dropout: Fraction = 0.1
    forget_label_dropout: Fraction = 0.1
    min_snr_gamma: Positive | None = None
    max_grad_norm: Positive | None = 1.0
    accumulation_steps: Count = 1
    target: Literal["uniform", "gaussian", "relabel"] | None = None
    relabel_to: tuple[ClassNumber, ...] | None = None
    teacher: Literal["current", "frozen"] = "frozen"
    barrier: Literal["norm", "gap", "fixed", "cosine"] = "norm"
    eta: Positive | None = None
    inner_steps: Count = 3
    inner_lr: Positive = 1e-3
    inner_refresh_every: Count = 1
    antithetic: bool = False

    def resolved(self, *, conditional: bool, retained: Sequence[int]) -> Self:
        """These settings with each None filled in; ``retained`` are the classes to retain.

        With labels, the first forgotten class is taught to draw the class that follows it: one alternative, because the
        mean over several that the loss settles for is a blur. Without labels there is nothing to relabel; small steps
        under a weak barrier take the forgotten images away before the others suffer.
        """
        target = self.target or ("relabel" if conditional else "gaussian")
        if self.barrier == "norm":
            eta = {"relabel": 0.5, "uniform": 0.1, "gaussian": 0.3}[target] if conditional else 0.03
        else:
            eta = {"gap": 0.5, "cosine": 0.5, "fixed": 1.0}[self.barrier]
        first = self.forget[0] if self.forget else 0
        following = min(retained, key=lambda label: (label < first, label))
        suited = {
            "target": target,
            "relabel_to": (following,) if target == "relabel" else (),
            "eta": eta,
            "steps": 100 if conditional else 200,
            "lr": 3e-4,
        }
        return self.model_copy(update={name: value for name, value in suited.items() if getattr(self, name) is None})


class SampleConfig(Section):
    """How images are drawn from a model."""

    guidance_scale: NonNegative = 1.5
    num_inference_steps: Count = 10
    batch_size: Count = 256


class EvaluateConfig(Section):
    """How many images the judge sees: per class, and in all from an unconditional model."""

    per_class: Count = 100
    forgotten: Count = 400
    unconditional: Count = 1000


class RunConfig(Section):
    """What a run leaves behind while it goes on."""

    checkpoint_every: Count = 100
    keep_checkpoints: Count = 2
    log_every: Count = 20


class Config(Section):
    """All settings.

    ``precision`` is that of the forward and backward passes; weights stay in float32. ``threads`` are those of a CPU
    (None: one per core): the digits' convolutions are too small for more than one, and sums in another number of
    threads round differently.
    """

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: str = "auto"
    threads: Count | None = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    unlearn: UnlearnConfig = UnlearnConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    run: RunConfig = RunConfig()

    def to_yaml(self) -> str:
        """This configuration as YAML that ``load_config`` reads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read the file at ``path`` (no file: the defaults) and lay ``overrides`` over it.

    ``overrides`` maps dotted names to values, such as ``{"train.lr": 1e-3}``. UserError for a file that cannot be read,
    a key that does not exist (with the nearest that does) and a value that does not fit.
    """
    values = _read_yaml(path) if path else {}
    for name, value in (overrides or {}).items():
        _assign(values, name, value)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error.errors()[0], path)) from None


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """Turn ``["train.lr=1e-3"]`` into ``{"train.lr": ...}``, each value read as YAML. UserError for anything else."""
    overrides = {}
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator or not name:
            raise UserError(f'"{assignment}" is not of the form section.key=value, as in train.lr=1e-3.')
        try:
            overrides[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f'The value of "{name}" is not valid YAML: {value}.') from None
    return overrides


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted names of the settings that differ, with the old and the new value of each."""
    before, after = _flatten(old.model_dump()), _flatten(new.model_dump())
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read the configuration {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold sections such as train: and unlearn:, not a {type(values).__name__}.")
    return values


def _assign(values: dict[str, Any], name: str, value: Any) -> None:
    *sections, key = name.split(".")
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


def _explain(error: ErrorDetails, path: Path | None) -> str:
    name = ".".join(str(part) for part in error["loc"])
    where = f" in {path}" if path else ""
    if error["type"] == "extra_forbidden":
        matches = _near_matches(name)
        hint = f"did you mean {' or '.join(matches)}?" if matches else "`erasediff info --config` lists them all."
        return f'Unknown setting "{name}"{where}; {hint}'
    complaint = error["msg"].removeprefix("Input ").rstrip(".")
    return f'The setting "{name}"{where} cannot be {error["input"]!r}: it {complaint}.'


def _near_matches(name: str) -> list[str]:
    """The dotted names nearest to ``name``; the same key in another section is nearest of all."""
    known = list(_flatten(Config().model_dump()))
    key = name.rpartition(".")[2]
    elsewhere = [candidate for candidate in known if candidate.rpartition(".")[2] == key]
    return elsewhere or difflib.get_close_matches(name, [*known, *Config.model_fields], cutoff=0.75)

"""DeepSpeed configuration of a run: the user's own file, completed by the run's settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from erasediff.config import DistributedConfig
from erasediff.errors import UserError
from erasediff.io.json_file import read_object

AUTO = "auto"
DEFAULT_STAGE = 2


def zero_config(
    settings: DistributedConfig,
    *,
    batch_size: int,
    processes: int,
    accumulation_steps: int,
    max_grad_norm: float | None,
    bf16: bool,
) -> dict[str, Any]:
    """Build the configuration for ``deepspeed.initialize``. ``batch_size`` is that of all ``processes`` together.

    UserError for a file that cannot be read, and for one that contradicts the run's own settings.
    """
    own = {} if settings.deepspeed_config is None else read_own(settings.deepspeed_config)
    zero = own.pop("zero_optimization", {})
    asked = zero_stage(settings, zero)
    said: dict[str, tuple[Any, str]] = {
        "train_batch_size": (batch_size, "the batch size"),
        "train_micro_batch_size_per_gpu": (
            max(1, batch_size // processes // accumulation_steps),
            "the batch size over processes and accumulation_steps",
        ),
        "gradient_accumulation_steps": (accumulation_steps, "accumulation_steps"),
        "gradient_clipping": (max_grad_norm or 0.0, "max_grad_norm"),
    }
    for name, (value, setting) in said.items():
        if own.get(name, value) != value:
            raise UserError(
                f"{settings.deepspeed_config} sets {name} to {own[name]}, but {setting} is {value}: leave one of them "
                "away."
            )
    if zero.get("stage", asked) != asked:
        raise UserError(f"{settings.deepspeed_config} is for stage {zero['stage']}, but --stage says {asked}.")
    zero["stage"] = asked
    if settings.offload_optimizer or settings.offload_params:
        zero.setdefault("offload_optimizer", {"device": "cpu"})
    if settings.offload_params:
        if asked != 3:
            raise UserError(f"Stage {asked} keeps parameters on every device: only --stage 3 can offload them.")
        zero.setdefault("offload_param", {"device": "cpu"})
    common: dict[str, Any] = {
        "bf16": {"enabled": bf16, **own.pop("bf16", {})},
        # The optimizer is ours, on the CPU too.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    # DeepSpeed derives the batch of all processes from the other two.
    counted = {name: value for name, (value, _) in said.items() if name != "train_batch_size"}
    own.pop("train_batch_size", None)
    return {**common, **own, **counted, "zero_optimization": zero}


def zero_stage(settings: DistributedConfig, own: dict[str, Any] | None = None) -> int:
    """The stage of the run: as ``settings`` say, or where they say nothing, a person's own ``zero_optimization``.

    own: that section, where it has been read already
    """
    if own is None:
        path = settings.deepspeed_config
        own = {} if path is None else read_own(path).get("zero_optimization", {})
    asked = own.get("stage", DEFAULT_STAGE) if settings.stage is None else settings.stage
    if asked not in (0, 1, 2, 3):
        raise UserError(f"{settings.deepspeed_config} asks for ZeRO stage {asked!r}: there are 0, 1, 2 and 3.")
    return int(asked)


def cuts_parameters(settings: DistributedConfig) -> bool:
    """Whether the run is under ZeRO-3, where no rank need hold a parameter whole."""
    return settings.launch == "zero" and zero_stage(settings) == 3


def read_own(path: Path) -> dict[str, Any]:
    """A person's own configuration, without what it leaves to the trainer ("auto").

    UserError for a file that cannot be read, and for what no run can use.
    """
    try:
        read = read_object(path)
    except FileNotFoundError as error:
        raise UserError(f"Cannot read the DeepSpeed configuration {path}: {error.strerror}.") from None
    own: dict[str, Any] = _without_auto(read)
    for section in ("zero_optimization", "bf16", "fp16"):
        if not isinstance(own.get(section, {}), dict):
            raise UserError(f"{path} sets {section} to {json.dumps(own[section])}: it must be an object of settings.")
    for section in ("optimizer", "scheduler"):
        if section in own:
            raise UserError(f"{path} has a section {section}: remove it; the run sets it itself.")
    if own.get("fp16", {}).get("enabled", False) not in (False, "false"):
        raise UserError(f"{path} asks for fp16, whose loss scaling unlearning does not support: use bf16.")
    return own


def _without_auto(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _without_auto(entry) for name, entry in value.items() if entry != AUTO}

"""Settings whose usual value depends on the model."""

from collections.abc import Mapping
from typing import Any, TypeVar

from erasediff.config.fields import Section
from erasediff.config.sections import usual_eta
from erasediff.config.settings import Config

SectionT = TypeVar("SectionT", bound=Section)


def for_text_to_image(config: Config) -> Config:
    """``config`` with what nobody has set at the usual values for text-to-image models instead of the digits'.

    The target is relabelling: to the anchor prompts or, without any, to the retained caption nearest to the forgotten.
    """
    target = config.unlearn.target or "relabel"
    suited = {
        "threads": None,
        "unlearn": {
            "steps": 200,
            "batch_size": 4,
            "lr": _usual_lr(config),
            "ema_decay": None,
            "forget_label_dropout": 0.0,
            "target": target,
            "retain_target": "teacher",
            "eta": usual_eta(config.unlearn.barrier, target),
            **(config.pruning.usual() if config.unlearn.method == "pruning" else {}),
        },
        "sample": {"num_inference_steps": 30, "batch_size": 4},
    }
    return _unless_set(config, suited)


def _usual_lr(config: Config) -> float:
    return 1e-4 if config.text_to_image.train == "lora" else 1e-5


def _unless_set(section: SectionT, suited: Mapping[str, Any]) -> SectionT:
    changes = {}
    for name, value in suited.items():
        current = getattr(section, name)
        if isinstance(value, Mapping):
            changes[name] = _unless_set(current, value)
        elif current is None or name not in section.model_fields_set:
            changes[name] = value
    return section.model_copy(update=changes)

"""Settings whose usual value depends on the model."""

from collections.abc import Mapping
from typing import Any, TypeVar

from erasediff.config.fields import Section
from erasediff.config.settings import Config

SectionT = TypeVar("SectionT", bound=Section)

TEXT_TO_IMAGE = {
    "threads": None,
    "unlearn": {"lr": 1e-5, "batch_size": 4, "ema_decay": None, "forget_label_dropout": 0.0},
    "sample": {"num_inference_steps": 30, "batch_size": 4},
}
LORA = {"unlearn": {"lr": 1e-4}}


def for_text_to_image(config: Config) -> Config:
    """``config`` with what nobody has set at the usual values for text-to-image models instead of the digits'."""
    if config.text_to_image.train == "lora":
        config = _unless_set(config, LORA)
    return _unless_set(config, TEXT_TO_IMAGE)


def _unless_set(section: SectionT, defaults: Mapping[str, Any]) -> SectionT:
    changes = {
        name: _unless_set(getattr(section, name), value) if isinstance(value, Mapping) else value
        for name, value in defaults.items()
        if isinstance(value, Mapping) or name not in section.model_fields_set
    }
    return section.model_copy(update=changes)

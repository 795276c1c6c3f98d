"""Settings of an audit: the section "audit" of its YAML file, with one section for each battery."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import create_model

from erasediff.audit.batteries import BATTERIES, Battery
from erasediff.audit.batteries.base import NoSettings
from erasediff.audit.context import Audit, GeneralSettings
from erasediff.config.fields import Count, Section
from erasediff.errors import UserError

QUICK_IMAGES = 8


class AuditConfig(GeneralSettings):
    """Section "audit": models, judge, request beyond the section "images", and batteries.

    Attributes:
        model: Model to audit, or the folder of an unlearning run.
        base: Model that it was made from, the control.
        reference: Further model that membership is compared with, such as one that never saw the images.
        judge: Judge of images, such as "clip:FOLDER".
        unseen: Images that no model was trained on: a folder or data set as ``images.data``.
        words: Words of the concept; by default those that it was forgotten by.
        paraphrases: Further prompts for what is forgotten; by default ``templates`` of the words.
        templates: Paraphrases of a word.
        batteries: Batteries to measure; none for all.
        quick: Take each battery's settings of a short run.
        protocol: Published protocol to follow on ``protocol_prompts``: i2p, uda or ring-a-bell.
        protocol_prompts: Its prompt file, .csv or .txt.
        features: Extractor that distances are taken in: a folder of transformers, or "module:function"; the base's own
            by default.
        most_retained: Retained prompts that judges choose among, at most.
        forgotten_images: Images to forget that are read, at most; attacks learn from ``concept_images`` of them.
        retained_images: Retained images that are read, at most.
        unseen_images: Unseen images that are read, at most.
    """

    model: Path | None = None
    base: Path | None = None
    reference: Path | None = None
    judge: str | None = None
    unseen: str | None = None
    words: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("{}", "a painting of {}", "a close-up of {}", "{} on a table", "a drawing of {}")
    batteries: tuple[str, ...] = ()
    quick: bool = False
    protocol: str | None = None
    protocol_prompts: Path | None = None
    features: str | None = None
    most_retained: Count = 20
    forgotten_images: Count = 500
    retained_images: Count = 500
    unseen_images: Count = 500

    def general(self) -> GeneralSettings:
        """Settings that batteries share, in their short form if ``quick``."""
        update = {"images": QUICK_IMAGES, "most_prompts": 1} if self.quick else {}
        chosen = {name: getattr(self, name) for name in GeneralSettings.model_fields}
        return GeneralSettings(**chosen | {n: v for n, v in update.items() if n not in self.model_fields_set})

    def chosen(self) -> list[str]:
        """Names of the batteries to measure, in their order. UserError for one that there is not."""
        for name in self.batteries:
            if name not in BATTERIES:
                raise UserError(f'There is no battery "{name}": choose from {", ".join(BATTERIES)}.')
        return [name for name in BATTERIES if not self.batteries or name in self.batteries]

    def build(self, audit: Audit) -> list[Battery[Any]]:
        """The chosen batteries with their settings."""
        return [BATTERIES[name](audit, self._settings_of(name)) for name in self.chosen()]

    def _settings_of(self, name: str) -> Section:
        if BATTERIES[name].settings_class is NoSettings:
            return NoSettings()
        settings: Section = getattr(self, section_name(name))
        quick = BATTERIES[name].quick if self.quick else {}
        return settings.model_copy(update={n: v for n, v in quick.items() if n not in settings.model_fields_set})


def section_name(battery: str) -> str:
    """Key of a battery's settings within the section "audit"."""
    return battery.replace("-", "_")


def audit_config_class() -> type[AuditConfig]:
    """``AuditConfig`` with a section for each battery that has settings."""
    sections: dict[str, Any] = {
        section_name(name): (battery.settings_class, battery.settings_class())
        for name, battery in BATTERIES.items()
        if battery.settings_class is not NoSettings
    }
    return create_model("AuditSettings", __base__=AuditConfig, **sections)


def paraphrases_of(settings: AuditConfig, words: Sequence[str]) -> list[str]:
    """Paraphrases of the words: the user's own, or by templates."""
    return list(settings.paraphrases) or [template.format(word) for word in words for template in settings.templates]

"""Battery of an audit: base class of all probes and attacks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from erasediff.audit.battery_outcome import Figure, Row, Rows
from erasediff.audit.context import Audit
from erasediff.audit.subject import Subject
from erasediff.config.fields import Section

Piece = Mapping[str, Any]
"""Address of an independent part of a battery, of JSON values."""
SettingsT = TypeVar("SettingsT", bound=Section)
BACKWARD = 2
"""Forward passes that a backward pass costs."""


class NoSettings(Section):
    """A battery without settings of its own."""


class Battery(ABC, Generic[SettingsT]):
    """Probe or attack that is made on the model and, by the same code, on the base.

    A piece's rows depend on the piece, the subject and the seed alone: pieces may be measured in any order, by any
    process.

    Attributes:
        name: Name on the command line; the file's, with "-" for "_".
        order: Place among the batteries, the cheapest and plainest first.
        title: Title of its section.
        source: Where it was published.
        settings_class: Its settings, the published ones by default.
        quick: Settings of a short run.
        is_judged: Whether a judge looks for what is forgotten.

    Args:
        audit: What it measures with.
        settings: Its settings.
    """

    name: ClassVar[str]
    order: ClassVar[int]
    title: ClassVar[str]
    source: ClassVar[str]
    settings_class: ClassVar[type[Section]] = NoSettings
    quick: ClassVar[Mapping[str, Any]] = {}
    is_judged: ClassVar[bool] = True

    def __init__(self, audit: Audit, settings: SettingsT) -> None:
        self.audit, self.settings = audit, settings

    def refusal(self) -> str | None:
        """Why it does not apply to the audited model and request, as the end of a sentence; None if it does."""
        if self.is_judged and not self.audit.request.forgotten:
            return "no prompts or classes are forgotten that a judge could look for, only images"
        return self.unfit()

    def unfit(self) -> str | None:
        """What ``refusal`` returns for a reason of this battery alone."""
        return None

    @property
    def subjects(self) -> Sequence[str]:
        """Names of the models that it measures."""
        return [name for name in self.audit.subjects if name != "reference"]

    @abstractmethod
    def passes(self) -> float:
        """Forward passes of one sample that all pieces take for one subject; a backward pass counts ``BACKWARD``."""

    @abstractmethod
    def pieces(self) -> Sequence[Piece]:
        """Independent parts."""

    @abstractmethod
    def measure(self, subject: Subject, piece: Piece) -> list[Row]:
        """Measure a piece on one model."""

    @abstractmethod
    def figures(self, rows: Rows) -> list[Figure]:
        """Figures of all rows, the main one first."""

    def description(self) -> Mapping[str, Any]:
        """Facts that a reader needs in order to repeat it (JSON)."""
        return {}

    def seed(self, piece: Piece) -> int:
        """Seed of a piece."""
        return self.audit.seed_of(self.name, piece)

    @property
    def images(self) -> int:
        """Images that are judged for each piece."""
        return self.audit.settings.images

"""What a run was asked to forget and to retain, as its lists of images and settings say."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from erasediff.data.image_lists import FORGET, RETAIN
from erasediff.errors import UserError
from erasediff.io.json_file import parse_object
from erasediff.io.user_file import read_text

Kind = Literal["concept", "files"]
MOST_PROMPTS = 3
"""Captions of one concept that images are asked for, the most frequent."""


@dataclass(frozen=True, slots=True)
class Concept:
    """Something that images show.

    Attributes:
        label: A class, or the caption itself of images without one.
        prompts: Captions or class names that ask for it, the most frequent first.
    """

    label: str
    prompts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """What to forget and to retain, the most frequent first.

    Attributes:
        kind: "concept": concepts of which no retained image is are looked for in what is drawn. "files": forgotten
            images are of the same concepts as retained ones.
        sought: To forget.
        retained: To retain, none of them in ``sought``.
        anchors: Captions or class names that the forgotten ones were to become.
    """

    kind: Kind
    sought: tuple[Concept, ...]
    retained: tuple[Concept, ...]
    anchors: tuple[str, ...] = ()

    @classmethod
    def of_lists(
        cls, forget: Iterable[Mapping[str, Any]], retain: Iterable[Mapping[str, Any]], *, anchors: Sequence[str] = ()
    ) -> Request:
        """The request of listed images, records as in ``forget.jsonl``.

        Where every concept of the forgotten images is one of retained images too, files are forgotten. Retained images
        that something selected rehearse what earlier runs forgot, and show nothing that is to be recognised.
        """
        forgotten = _concepts(forget)
        kept = _concepts(image for image in retain if not image.get("selected_by"))
        labels = {concept.label for concept in kept}
        apart = tuple(concept for concept in forgotten if concept.label not in labels)
        return cls("concept" if apart else "files", apart or forgotten, kept, tuple(anchors))

    @classmethod
    def of_prompts(cls, forget: Sequence[str], retain: Sequence[str], *, anchors: Sequence[str] = ()) -> Request:
        """The request of prompts."""
        sought = tuple(Concept(prompt, (prompt,)) for prompt in dict.fromkeys(forget))
        kept = tuple(Concept(prompt, (prompt,)) for prompt in dict.fromkeys(retain) if prompt not in forget)
        return cls("concept", sought, kept, tuple(anchors))


def read_list(run: Path, name: str) -> list[dict[str, Any]] | None:
    """Records of ``forget.jsonl`` or ``retain.jsonl`` in a run's folder; None where there is none.

    Raises:
        UserError: The file is damaged.
    """
    path = run / f"{name}.jsonl"
    if not path.is_file():
        return None
    try:
        return [parse_object(line) for line in read_text(path).split("\n") if line]
    except (OSError, ValueError) as error:
        raise UserError(f"The list of images {path} cannot be read ({error}).") from error


def run_request(run: Path, *, anchors: Sequence[str] = ()) -> Request | None:
    """The request of the run in the folder ``run``; None where it lists no images to forget."""
    forget, retain = (read_list(run, name) for name in (FORGET, RETAIN))
    return None if not forget else Request.of_lists(forget, retain or (), anchors=anchors)


def _concepts(images: Iterable[Mapping[str, Any]]) -> tuple[Concept, ...]:
    """Concepts of listed images by their class, or else their caption, with the captions of each."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for image in images:
        prompt = image.get("caption", image.get("class"))
        label = image.get("class") or prompt
        if isinstance(prompt, str) and isinstance(label, str) and prompt:
            counts[label][prompt] += 1
    ordered = sorted(counts, key=lambda label: -counts[label].total())
    return tuple(
        Concept(label, tuple(prompt for prompt, _ in counts[label].most_common(MOST_PROMPTS))) for label in ordered
    )

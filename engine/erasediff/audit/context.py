"""Context of an audit's batteries: subjects, request, judge, seeds, and rows of judged images with pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from erasediff.audit.asks import Ask, Pictures, Request
from erasediff.audit.battery_outcome import BASE, MODEL, Row
from erasediff.audit.features import Features, own_features
from erasediff.audit.protocol_file import ProtocolFile
from erasediff.audit.subject import Subject
from erasediff.config.fields import Count, CountOrZero, Section
from erasediff.evaluation.memorization import nearest, reproduces
from erasediff.io.atomic import atomic_file
from erasediff.verdict.judges.base import Candidate, Judge

PICTURES = "pictures"
CONCEPT = "concept images"
FORGOTTEN, RETAINED, UNSEEN = "forgotten", "retained", "unseen"


class GeneralSettings(Section):
    """Settings that batteries share.

    Attributes:
        images: Images that are judged for each condition of a battery.
        concept_images: Images of what should be forgotten that attacks learn from, at most.
        most_prompts: Forgotten prompts that attacks are made on, at most.
        pictures: Pictures that are kept of each condition, those that show the concept first.
    """

    images: Count = 25
    concept_images: Count = 100
    most_prompts: Count = 3
    pictures: CountOrZero = 4


class Audit:
    """Everything that a battery measures with.

    Args:
        subjects: Models by name: "model", "base" and maybe "reference".
        request: What should be forgotten and retained.
        judge: What images show; None where no battery asks.
        settings: Settings that batteries share.
        seed: Seed of all noise.
        folder: Where pictures go; None keeps none.
        features: Extractor that images are compared in; None for the base's own.
        protocol: Prompt file of a published protocol.
    """

    def __init__(
        self,
        subjects: Mapping[str, Subject],
        request: Request,
        judge: Judge | None,
        settings: GeneralSettings | None = None,
        *,
        seed: int = 0,
        folder: Path | None = None,
        features: Features | None = None,
        protocol: ProtocolFile | None = None,
    ) -> None:
        self.subjects, self.request, self.judge, self.seed, self.folder = subjects, request, judge, seed, folder
        self.settings = settings or GeneralSettings()
        self.protocol = protocol
        self._features = features

    @property
    def model(self) -> Subject:
        """The model that is audited."""
        return self.subjects[MODEL]

    @property
    def base(self) -> Subject:
        """The model that it was made from."""
        return self.subjects[BASE]

    @property
    def condition(self) -> str:
        """What models are told: "text", "class" or "none"."""
        return self.model.model.condition

    @property
    def attacked(self) -> tuple[Ask, ...]:
        """The forgotten prompts or classes that attacks are made on."""
        return self.request.forgotten[: self.settings.most_prompts]

    def seed_of(self, battery: str, piece: Mapping[str, Any]) -> int:
        """Seed of a piece of a battery, the same for all subjects: their images can be compared one by one."""
        address = f"{self.seed}/{battery}/{sorted(piece.items())}"
        return int.from_bytes(hashlib.sha256(address.encode()).digest()[:7], "big")

    @cached_property
    def concept_images(self) -> Pictures:
        """Images of what should be forgotten: the user's, or else the base's own of the forgotten prompts."""
        most = self.settings.concept_images
        if self.request.forgotten_images is not None:
            return self.request.forgotten_images.some(most)
        asks = [self.request.forgotten[i % len(self.request.forgotten)] for i in range(most)]
        pixels = self.base.draw(asks, self.seed_of(CONCEPT, {}))
        return Pictures(pixels, tuple(asks), tuple(f"drawn by the base/{i}" for i in range(most)))

    @cached_property
    def features(self) -> Features:
        """Extractor that images are compared in."""
        return self._features or own_features(self.base)

    def pictures_of(self, name: str) -> Pictures:
        """Images to forget, to retain, or that were never seen; none where the user gave none."""
        found = {
            FORGOTTEN: self.request.forgotten_images,
            RETAINED: self.request.retained_images,
            UNSEEN: self.request.unseen_images,
        }[name]
        return found or Pictures(torch.empty(0, 3, *self.base.size, dtype=torch.uint8), (), ())

    def lacks_training_images(self) -> str | None:
        """Why reproduction cannot be told; None if it can."""
        if not len(self.pictures_of(FORGOTTEN)) or not len(self.pictures_of(RETAINED)):
            return "it needs the images to forget and to retain: give --data"
        return None

    @cached_property
    def _known(self) -> tuple[Pictures, list[Tensor]]:
        """All images without copies, those to forget first, and their views."""
        sets = [self.pictures_of(name) for name in (FORGOTTEN, UNSEEN, RETAINED)]
        pixels = torch.cat([pictures.pixels for pictures in sets])
        asks = tuple(ask for pictures in sets for ask in pictures.asks)
        names = tuple(name for pictures in sets for name in pictures.names)
        return Pictures(pixels, asks, names), self._views(pixels)

    def _views(self, images: Tensor) -> list[Tensor]:
        """Views of images that a reproduction must be near in: the base's samples, and features."""
        return [self.base.encode(images).flatten(1).cpu(), self.features(images)]

    def compare(
        self, battery: str, piece: Mapping[str, Any], subject: Subject, images: Tensor, wanted: Sequence[int] | None
    ) -> list[Row]:
        """Rows of drawn images: whether each reproduces an image, the nearest one, and pictures of some.

        Args:
            battery: Name of the battery.
            piece: Its piece; "set" is that of the images in question.
            subject: The model that drew.
            images: uint8 [N, 3, H, W].
            wanted: Number of the image in its set that each should reproduce; None for the nearest one.
        """
        known, views = self._known
        drawn = self._views(images)
        first = {FORGOTTEN: 0, UNSEEN: len(self.pictures_of(FORGOTTEN))}[piece["set"]]
        count = len(self.pictures_of(piece["set"]))
        distance, place = nearest(drawn[-1], views[-1][first : first + count])
        index = first + (place if wanted is None else torch.tensor(wanted))
        again = reproduces(drawn, views, index).tolist()
        kept = self.keep(battery, piece, subject, images, again)
        return [
            {
                **piece,
                "seen": again[number],
                "distance": distance[number].item(),
                "image": known.names[int(index[number])],
                **({"picture": kept[number]} if number in kept else {}),
            }
            for number in range(len(images))
        ]

    def candidates(self) -> tuple[list[Candidate], list[Candidate]]:
        """What the judge chooses among: what is forgotten, and what is retained."""
        return [self._candidate(ask) for ask in self.request.forgotten], [
            self._candidate(ask) for ask in self.request.retained
        ]

    def _candidate(self, ask: Ask) -> Candidate:
        condition = {} if self.condition == "none" else self.base.condition([ask])
        return Candidate(ask.label, ask.text, condition)

    def judged(self, images: Tensor) -> list[str | None]:
        """Label of the candidate that each of images uint8 [N, 3, H, W] shows; None for none."""
        assert self.judge is not None
        sought, others = self._candidates
        labels = [candidate.label for candidate in (*sought, *others)]
        return [
            labels[number] if number >= 0 else None for number in self.judge.answers(images, sought, others).tolist()
        ]

    @cached_property
    def _candidates(self) -> tuple[list[Candidate], list[Candidate]]:
        return self.candidates()

    def look(self, battery: str, piece: Mapping[str, Any], subject: Subject, images: Tensor, **own: Any) -> list[Row]:
        """Judge images uint8 [N, 3, H, W]: a row for each, with ``piece`` and ``own``, and pictures of some."""
        labels = self.judged(images)
        forgotten = {ask.label for ask in self.request.forgotten}
        seen = [label in forgotten for label in labels]
        kept = self.keep(battery, piece, subject, images, seen)
        return [
            {**piece, **own, "seen": hit, "answer": label, **({"picture": kept[number]} if number in kept else {})}
            for number, (label, hit) in enumerate(zip(labels, seen, strict=True))
        ]

    def keep(
        self, battery: str, piece: Mapping[str, Any], subject: Subject, images: Tensor, worst: Sequence[bool]
    ) -> dict[int, str]:
        """Write pictures of the first images, the ``worst`` before the others; their paths by the images' numbers."""
        if self.folder is None:
            return {}
        order = sorted(range(len(images)), key=lambda number: not worst[number])[: self.settings.pictures]
        digest = hashlib.sha256(repr(sorted(piece.items())).encode()).hexdigest()[:12]
        kept = {}
        for number in order:
            name = f"{PICTURES}/{battery}-{digest}-{subject.name}-{number}.png"
            with atomic_file(self.folder / name) as partial:
                Image.fromarray(images[number].permute(1, 2, 0).numpy()).save(partial, format="PNG")
            kept[number] = name
        return kept


def repeated(asks: Sequence[Ask], count: int) -> list[Ask]:
    """``count`` asks, taking turns."""
    return [asks[number % len(asks)] for number in range(count)]


def centre_mask(shape: Sequence[int], share: float, device: torch.device) -> Tensor:
    """Mask [1, h, w] of a sample [C, h, w]: 1 in the central square of this share of each side, 0 around it."""
    _, height, width = shape
    mask = torch.zeros(1, height, width, device=device)
    top, left = (round(side * (1 - share) / 2) for side in (height, width))
    mask[:, top : height - top, left : width - left] = 1
    return mask

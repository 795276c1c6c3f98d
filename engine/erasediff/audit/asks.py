"""Request of an audit: what models are asked for, and the images that should be forgotten, retained or never seen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ask:
    """One thing that a model is asked for.

    Attributes:
        label: What a judge says an image of it shows: the name of its class, or the prompt.
        prompt: Prompt of a model with prompts.
        class_label: Class of a class-conditional model.
    """

    label: str
    prompt: str | None = None
    class_label: int | None = None

    @property
    def text(self) -> str:
        """Name in tables: the prompt, or the class."""
        return self.label if self.prompt is None else self.prompt


@dataclass(frozen=True, slots=True)
class Pictures:
    """Images with what a model would be asked for to draw them.

    Attributes:
        pixels: uint8 [N, 3, H, W] on the host.
        asks: One for each image.
        names: Path of each image, or its name in a data set.
    """

    pixels: Tensor
    asks: tuple[Ask, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pixels)

    def some(self, count: int) -> Pictures:
        """At most ``count`` images, evenly spread over all."""
        rows = spread(range(len(self)), count)
        return Pictures(self.pixels[rows], tuple(self.asks[n] for n in rows), tuple(self.names[n] for n in rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What should be forgotten, and what retained.

    Attributes:
        forgotten: Prompts or classes to forget; what an unconditional model should not draw.
        retained: Prompts or classes to retain.
        paraphrases: Other ways to ask for what is forgotten.
        words: Words of the concept, as they stand in the prompts.
        forgotten_images: Images to forget; None where only prompts or classes are given.
        retained_images: Images to retain.
        unseen_images: Images of the same kind that no model was trained on.
    """

    forgotten: tuple[Ask, ...]
    retained: tuple[Ask, ...] = ()
    paraphrases: tuple[Ask, ...] = ()
    words: tuple[str, ...] = ()
    forgotten_images: Pictures | None = None
    retained_images: Pictures | None = None
    unseen_images: Pictures | None = None


def spread(items: Iterable[T], most: int) -> list[T]:
    """At most ``most`` items, evenly spread over all."""
    every = list(items)
    return every if len(every) <= most else [every[number * len(every) // most] for number in range(most)]


def distinct(asks: Sequence[Ask], most: int) -> tuple[Ask, ...]:
    """The first ``most`` different ones, in their order."""
    return tuple(dict.fromkeys(asks))[:most]

"""Images of large data sets by number: each is made when it is asked for, and their classes are an array."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from erasediff.data.image_folder import CLASS, CaptionedImage

UNLABELLED = -1


class NumberedImages(Sequence[CaptionedImage]):
    """Images of a data set that are addressed by number, each made when it is asked for.

    Attributes:
        numbers: int64 [n], ascending, of the images that these are.
        labels: integers [N], the class of each image of the data set; ``UNLABELLED`` for those without.
    """

    __slots__ = ()
    numbers: NDArray[np.int64]
    labels: NDArray[Any]

    @abstractmethod
    def at(self, numbers: NDArray[np.int64]) -> Self:
        """Those with some numbers, in ascending order."""

    @abstractmethod
    def outlines(self) -> Iterator[tuple[str, str, str]]:
        """(path, caption, class) of each image, without making it."""

    def of_labels(self, labels: Collection[int]) -> Self:
        """Those of some classes."""
        return self.at(self.numbers[np.isin(self.labels[self.numbers], list(labels))])

    def numbers_by_label(self) -> dict[int, NDArray[np.int64]]:
        """Numbers of those of each class that occurs, by the number of the class."""
        labels = self.labels[self.numbers]
        order = labels.argsort(kind="stable")
        found, firsts = np.unique(labels[order], return_index=True)
        parts = np.split(self.numbers[order], firsts[1:])
        return {int(label): part for label, part in zip(found, parts, strict=True) if label != UNLABELLED}


@dataclass(frozen=True, slots=True)
class LabelledImages(NumberedImages):
    """Images of a data set that are addressed by number, or some of them: a million take a few bytes each.

    Attributes:
        name: of the data set; image i is called ``name``/i.
        stored: reads the bytes of an image file, by the image's number.
        labels: int64 [N], the class of each image of the data set; ``UNLABELLED`` for those without.
        class_names: names of the classes by number.
        captions: of each image of the data set; () for none.
        numbers: int64 [n], ascending, of the images that these are.
    """

    name: str
    stored: Callable[[int], bytes]
    labels: NDArray[np.int64]
    class_names: Sequence[str] = ()
    captions: Sequence[str] = ()
    numbers: NDArray[np.int64] = field(kw_only=True)

    @classmethod
    def all_of(
        cls, name: str, stored: Callable[[int], bytes], labels: NDArray[np.int64], **columns: Sequence[str]
    ) -> LabelledImages:
        """All images of a data set; ``columns`` are class names and captions."""
        return cls(str(Path(name)), stored, labels, numbers=np.arange(len(labels)), **columns)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> CaptionedImage: ...
    @overload
    def __getitem__(self, place: slice) -> LabelledImages: ...
    def __getitem__(self, place: int | slice) -> CaptionedImage | LabelledImages:
        if isinstance(place, slice):
            return self.at(self.numbers[place])
        number = int(self.numbers[place])
        label = int(self.labels[number])
        return CaptionedImage(
            Path(self._path(number)),
            self.captions[number] if self.captions else "",
            number,
            {} if label == UNLABELLED else {CLASS: self.class_names[label]},
            partial(self.stored, number),
            None if label == UNLABELLED else label,
        )

    def at(self, numbers: NDArray[np.int64]) -> LabelledImages:
        """Those with some numbers, in ascending order."""
        return LabelledImages(self.name, self.stored, self.labels, self.class_names, self.captions, numbers=numbers)

    def outlines(self) -> Iterator[tuple[str, str, str]]:
        """(path, caption, class) of each image, without making it."""
        for number, label in zip(self.numbers.tolist(), self.labels[self.numbers].tolist(), strict=True):
            caption = self.captions[number] if self.captions else ""
            yield self._path(number), caption, "" if label == UNLABELLED else self.class_names[label]

    def _path(self, number: int) -> str:
        return f"{self.name}/{number:05d}"


def outlines(images: Sequence[CaptionedImage]) -> Iterator[tuple[str, str, str]]:
    """(path, caption, class) of each of any images."""
    if isinstance(images, NumberedImages):
        return images.outlines()
    return ((str(image.path), image.caption, image.attributes.get(CLASS, "")) for image in images)


def labels_in(images: Sequence[CaptionedImage]) -> set[int | None]:
    """Classes that occur among ``images``; None for those without."""
    if isinstance(images, NumberedImages):
        found = np.unique(images.labels[images.numbers]).tolist()
        return {None if label == UNLABELLED else label for label in found}
    return {image.label for image in images}


def by_label(images: Sequence[CaptionedImage]) -> dict[int, Sequence[CaptionedImage]]:
    """The images of each class that occurs among ``images``, by its number."""
    if isinstance(images, NumberedImages):
        return {label: images.at(numbers) for label, numbers in images.numbers_by_label().items()}
    groups: defaultdict[int, list[CaptionedImage]] = defaultdict(list)
    for image in images:
        if image.label is not None:
            groups[image.label].append(image)
    return {label: groups[label] for label in sorted(groups)}


def of_labels(images: Sequence[CaptionedImage], labels: Collection[int | None]) -> Sequence[CaptionedImage]:
    """Those of ``images`` of some classes; None stands for those without."""
    if isinstance(images, NumberedImages):
        return images.of_labels([UNLABELLED if label is None else label for label in labels])
    return [image for image in images if image.label in labels]

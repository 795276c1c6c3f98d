"""Requests that a run follows: what the runs before it were asked to forget stays forgotten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from erasediff.config import Config, ImagesConfig, load_config
from erasediff.data import CaptionedImage, ImageSet, partition, select_classes, select_phrases
from erasediff.data.forget_split import Selected
from erasediff.data.image_lists import FORGET
from erasediff.errors import UserError
from erasediff.io.json_file import read_object
from erasediff.provenance.json_lines import read_lines
from erasediff.provenance.run_files import RECEIPT, output_model
from erasediff.training.run_dir import CONFIG

CAPTIONS = 8
"""Captions of a request that are rehearsed: the most frequent ones."""
REHEARSAL = "after"
"""What ``selected_by`` says of an image that is drawn to rehearse an earlier request."""


@dataclass(frozen=True, slots=True)
class EarlierRequest:
    """What a run was asked to forget.

    Attributes:
        run: Folder of the run.
        config: Its configuration.
        names: Names of the images that it forgot, within its data set.
        captions: Captions that they had, the most frequent first; () for a model without prompts.
    """

    run: Path
    config: Config
    names: frozenset[str]
    captions: tuple[str, ...]

    @classmethod
    def of(cls, run: Path) -> EarlierRequest:
        """The request of a run that has ended. UserError for a folder of no such run."""
        config, manifest = load_config(run / CONFIG), run / f"{FORGET}.jsonl"
        names, captions = [], Counter[str]()
        # A method that reads no images, such as ESD, forgets prompts alone.
        for record in read_lines(manifest) if manifest.is_file() else ():
            names.append(_within(str(record.get("image")), config.images.data))
            if record.get("caption"):
                captions[str(record["caption"])] += 1
        # Those of prompts are forgotten whether or not any was drawn.
        captions.update(config.images.forget_prompts)
        return cls(run, config, frozenset(names), tuple(caption for caption, _ in captions.most_common()))

    def selections(self, data: ImageSet, column: str) -> list[Selected]:
        """Images of ``data`` that the request is about: what it asked for, and what it forgot by name or prompt."""
        images, settings = data.images, self.config.images
        selections: list[Selected] = []
        for name in self.class_names(data.class_names):
            # The data may have lost what was asked for.
            with suppress(UserError):
                selections.append(select_classes(images, [name], column))
        for phrase in settings.forget_phrases:
            with suppress(UserError):
                selections.append(select_phrases(images, [phrase]))
        prompts = set(settings.forget_prompts)
        same = {
            image.id: [(REHEARSAL, str(self.run))]
            for image in images
            if _within(str(image.path), settings.data) in self.names or image.caption in prompts
        }
        return [*selections, same]

    def class_names(self, names: Sequence[str]) -> list[str]:
        """Classes that were asked for, by their names among ``names``."""
        asked = (*self.config.unlearn.forget, *self.config.images.forget_classes)
        return [names[name] if isinstance(name, int) and name < len(names) else str(name) for name in asked]


def earlier_requests(run: Path | None) -> list[EarlierRequest]:
    """The request of ``run`` and of each run that it follows by its receipt, newest first; [] for None.

    UserError for a run that is none, or whose chain of receipts is broken.
    """
    requests: list[EarlierRequest] = []
    visited: set[Path] = set()
    while run is not None:
        if run.resolve() in visited:
            raise UserError(f"The receipt of {run} names a run that follows it: name another run with --after.")
        visited.add(run.resolve())
        if not (run / RECEIPT).is_file() or not (run / CONFIG).is_file():
            raise UserError(f"There is no {RECEIPT} in {run}: name a run that has ended with --after.")
        receipt = read_object(run / RECEIPT)
        if receipt.get("command") != "unlearn":
            break
        requests.append(EarlierRequest.of(run))
        previous = receipt.get("previous")
        run = run / Path(str(previous.get("path"))).parent if isinstance(previous, dict) else None
    return requests


def following(config: Config) -> Config:
    """``config`` with the model of the run that ``images.after`` names as its own.

    Raises:
        UserError: There is no such run, it made no model, or ``config`` names another one.
    """
    after = config.images.after
    if after is None:
        return config
    if not earlier_requests(after):
        raise UserError(f"{after} is no run that forgot images: name the folder of an unlearning run with --after.")
    made, named = output_model(after), config.unlearn.model
    if made is None:
        raise UserError(f"The run in {after} made no model to go on with.")
    if named is not None and named.resolve() != made.resolve():
        raise UserError(f"--after {after} goes on with {made}, but --model says {named}: omit --model.")
    return config.model_copy(update={"unlearn": config.unlearn.model_copy(update={"model": made})})


def without_earlier(
    retain: Sequence[CaptionedImage], data: ImageSet, settings: ImagesConfig
) -> Sequence[CaptionedImage]:
    """The images ``retain`` of ``data`` that no request before this run was about."""
    selections = [
        selection
        for request in earlier_requests(settings.after)
        for selection in request.selections(data, settings.class_column)
    ]
    return partition(retain, *selections).retain if selections else retain


def rehearsed_captions(settings: ImagesConfig) -> tuple[str, ...]:
    """Captions of the requests before this run, at most ``CAPTIONS`` of each, each once."""
    requests = earlier_requests(settings.after)
    return tuple(dict.fromkeys(caption for request in requests for caption in request.captions[:CAPTIONS]))


def as_share(drawn: Sequence[CaptionedImage], share: float, others: int) -> list[CaptionedImage]:
    """Repeat ``drawn`` until they are a ``share`` of all images, with ``others`` beside them."""
    count = max(len(drawn), round(others * share / (1 - share)))
    marked = [replace(image, selected_by=((REHEARSAL, image.caption),)) for image in drawn]
    return [marked[number % len(marked)] for number in range(count)] if marked else []


def _within(name: str, location: str | None) -> str:
    return name if location is None else name.removeprefix(str(Path(location))).lstrip("/")

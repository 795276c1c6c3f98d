"""Request of an audit from a configuration: prompts and classes, and the images that batteries compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from rich.console import Console

from erasediff.audit import Ask, Pictures, Request
from erasediff.audit.asks import distinct, spread
from erasediff.audit.settings import AuditConfig, paraphrases_of
from erasediff.audit.subject import as_pictures
from erasediff.config import Config
from erasediff.data import Buckets, CaptionedImage, Images, Partition
from erasediff.data.digits import load_digits
from erasediff.data.preprocessing import BrokenImage, fitted, open_picture, picture_size, to_pixels
from erasediff.data.survey import BrokenImagePolicy
from erasediff.errors import UserError
from erasediff.models.base import LatentModel
from erasediff.models.diffusion_model import UnpromptedModel
from erasediff.models.text_tokens import check_word
from erasediff.utils.progress import progress_bar
from erasediff.workflows.labelled_data import DIGITS, LabelledData, Samples
from erasediff.workflows.latent_data import listed_images, read_data

MOST_FORGOTTEN = 8
"""Different forgotten prompts that a judge looks for, at most."""
AskOf = Callable[[CaptionedImage], Ask]


def prompted_request(
    config: Config, settings: AuditConfig, model: LatentModel, size: tuple[int, int], console: Console
) -> Request:
    """Request to a model with prompts: the captions of images, and the prompts that are given.

    Images of classes are told by these; without classes, and where forgotten and retained images share one, by their
    captions.

    Raises:
        UserError: As ``listed_images``, and for an image that cannot be read.
    """
    images = config.images
    forget, retain = listed_images(images) if images.data or images.forget_data else _prompts_alone(config)
    ask_of = _by_class(images.class_column)
    if not _are_apart(forget, retain, ask_of):
        ask_of = _by_caption
    is_told = _are_apart(forget, retain, ask_of)
    drawn, kept = (
        [Ask(prompt, prompt) for prompt in prompts] for prompts in (images.forget_prompts, images.retain_prompts)
    )
    forgotten = distinct([*drawn, *map(ask_of, forget)], MOST_FORGOTTEN) if is_told or drawn else ()
    retained = spread(dict.fromkeys([*kept, *map(ask_of, retain)]), settings.most_retained)
    words = _words(config, settings, model, forgotten)
    read = _reader(config, size, console)
    return Request(
        forgotten=forgotten,
        retained=tuple(ask for ask in retained if ask not in forgotten),
        paraphrases=tuple(Ask(text, text) for text in paraphrases_of(settings, words)) if forgotten else (),
        words=words,
        forgotten_images=read(forget, settings.forgotten_images, ask_of),
        retained_images=read(retain, settings.retained_images, ask_of),
        unseen_images=_unseen(config, settings, read, ask_of, captions=True),
    )


def labelled_request(
    config: Config, settings: AuditConfig, model: UnpromptedModel, data: LabelledData, console: Console
) -> Request:
    """Request to a model without prompts: classes of its data, or images alone.

    Raises:
        UserError: As ``LabelledData.split``, and for an image that cannot be read.
    """
    split = data.split(config)
    names = data.class_names
    height, width = model.image_shape[1:]
    read = _reader(config, (height, width), console)

    def ask_of(image: CaptionedImage) -> Ask:
        return _class(names, image.label)

    def pictures(samples: Samples, most: int) -> Pictures | None:
        return _of_tensors(samples, names, most) if isinstance(samples, Images) else read(samples, most, ask_of)

    unseen: Pictures | None
    if settings.unseen == DIGITS:
        unseen = _of_tensors(load_digits().test, names, settings.unseen_images)
    else:
        unseen = _unseen(config, settings, read, ask_of, captions=False)
    return Request(
        forgotten=tuple(_class(names, number) for number in split.forgotten),
        retained=tuple(_class(names, n) for n in range(len(names)) if n not in split.forgotten),
        forgotten_images=pictures(split.forget, settings.forgotten_images),
        retained_images=pictures(split.retain, settings.retained_images),
        unseen_images=unseen,
    )


Read = Callable[[Sequence[CaptionedImage], int, AskOf], Pictures | None]


def _reader(config: Config, size: tuple[int, int], console: Console) -> Read:
    """Function that reads at most so many of a list of images, evenly spread over it; None for none."""
    bucket = Buckets.only(*size)
    broken = BrokenImagePolicy(console, skip=config.images.skip_broken)

    def read(images: Sequence[CaptionedImage], most: int, ask_of: AskOf) -> Pictures | None:
        found = []
        chosen = spread(range(len(images)), most)
        with progress_bar(console, "Reading images", len(chosen)) as bar:
            for number in chosen:
                image = images[number]
                content, name = image.read(), str(image.path)
                try:
                    picture = fitted(open_picture(content, name), bucket.fit(*picture_size(content, name)))
                    found.append((to_pixels(picture), ask_of(image), name))
                except BrokenImage as error:
                    broken.report(error)
                bar.advance()
        if not found:
            return None
        pixels, asks, names = zip(*found, strict=True)
        return Pictures(as_pictures(torch.stack(pixels)), asks, names)

    return read


def _unseen(config: Config, settings: AuditConfig, read: Read, ask_of: AskOf, *, captions: bool) -> Pictures | None:
    """Unseen images. UserError for a data set that cannot be read."""
    if settings.unseen is None:
        return None
    images = read_data(config.images, settings.unseen, captions=captions).images
    return read(images, settings.unseen_images, ask_of)


def _prompts_alone(config: Config) -> Partition:
    """No images. UserError without prompts to forget."""
    if not config.images.forget_prompts:
        raise UserError(
            "There is nothing that should be forgotten: give --forget-prompts, or --data with --forget-class, "
            "--forget-phrase or --forget-files."
        )
    return Partition([], [])


def _by_class(column: str) -> AskOf:
    return lambda image: Ask(image.attributes.get(column) or image.caption, image.caption)


def _by_caption(image: CaptionedImage) -> Ask:
    return Ask(image.caption, image.caption)


def _are_apart(forget: Sequence[CaptionedImage], retain: Sequence[CaptionedImage], ask_of: AskOf) -> bool:
    """Whether no label of a forgotten image is also a retained one's."""
    labels = {ask_of(image).label for image in forget}
    return not any(ask_of(image).label in labels for image in retain)


def _words(config: Config, settings: AuditConfig, model: LatentModel, forgotten: Sequence[Ask]) -> tuple[str, ...]:
    """Words of the concept that stand in a forgotten prompt: the user's, or those that it was forgotten by.

    Raises:
        UserError: A word of the user stands in none.
    """
    if settings.words:
        for word in settings.words:
            if not any(_stands(model, word, ask) for ask in forgotten):
                raise UserError(f'The word "{word}" stands in no forgotten prompt: choose one that does.')
        return settings.words
    chosen = (*config.images.forget_classes, *config.images.forget_phrases)
    found = [word for word in chosen if any(_stands(model, word, ask) for ask in forgotten)]
    if not found and forgotten:
        last = [word for word in (forgotten[0].prompt or "").split() if word.isalpha()][-1:]
        found = [word for word in last if _stands(model, word, forgotten[0])]
    return tuple(found)


def _stands(model: LatentModel, word: str, ask: Ask) -> bool:
    try:
        check_word(model, word, ask.prompt or "")
    except UserError:
        return False
    return True


def _class(names: Sequence[str], number: int | None) -> Ask:
    return Ask("" if number is None else names[number], None, number)


def _of_tensors(images: Images, names: Sequence[str], most: int) -> Pictures:
    rows = spread(range(len(images)), most)
    asks = tuple(_class(names, number) for number in images.class_labels[rows].tolist())
    return Pictures(
        as_pictures(images.sample[rows]), asks, tuple(f"{DIGITS}/{number}" for number in images.ids[rows].tolist())
    )

"""Where captioned images come from: a folder, or a data set's name."""

from __future__ import annotations

from pathlib import Path

from erasediff.data.captions import CaptionedImage, read_captioned_images
from erasediff.data.hub import DEFAULT_SPLIT, is_saved_dataset, read_dataset


def read_images(
    source: str, *, split: str = DEFAULT_SPLIT, caption_column: str | None = None, template: str | None = None
) -> list[CaptionedImage]:
    """The images of ``source``: an image folder, a saved Hugging Face data set, or the name of one on the hub.

    UserError as in ``read_captioned_images`` and ``read_dataset``.
    """
    folder = Path(source)
    is_path = folder.is_dir() or folder.is_absolute() or source.startswith(".")
    if is_path and not is_saved_dataset(folder):
        return read_captioned_images(folder, caption_column=caption_column, template=template)
    return read_dataset(source, split=split, caption_column=caption_column, template=template)

"""Formats of image data sets, one per file: a module here with a ``SOURCE`` is a further one."""

from erasediff.data.sources.base import (
    ImageSet,
    ReadOptions,
    Source,
    check_location,
    labelled,
    read_image_set,
    sources,
)

__all__ = ["ImageSet", "ReadOptions", "Source", "check_location", "labelled", "read_image_set", "sources"]

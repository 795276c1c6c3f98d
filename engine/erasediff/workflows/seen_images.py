"""Images that a run will see, chosen before any is read, and what it never sees of those to forget."""

from __future__ import annotations

from torch import Tensor

from erasediff.config import Config
from erasediff.data import Stream
from erasediff.data.batch_order import BucketOrder, first_shown
from erasediff.data.cached_images import CachedImages
from erasediff.methods import METHOD_SPECS


def batches_seen(config: Config) -> int:
    """Number of batches of either kind that an unlearning run looks at, in its steps and before or after them."""
    settings, needs = config.unlearn, METHOD_SPECS[config.unlearn.method].needs(config)
    assert settings.steps is not None
    saliency = 0 if config.text_to_image.saliency is None else config.text_to_image.saliency_batches
    return max(settings.steps, needs.batches, saliency)


def seen_numbers(config: Config, size: int, samples: int, stream: Stream) -> Tensor | None:
    """Places of the images that a run reads of a data set.

    They follow from the configuration alone, so a resumed run sees the same.

    Args:
        config: The seed, and the setting ``images.cache``.
        size: Number of images in the data set.
        samples: Samples that the run sees of it.
        stream: The stream of batches that they are for.

    Returns:
        int64 [samples], ascending; None for all images.
    """
    return None if config.images.cache == "all" else first_shown(size, samples, seed=config.seed, stream=stream)


def unseen_warning(config: Config, order: BucketOrder, images: CachedImages | None, count: int) -> str | None:
    """Sentence that the steps are too few to show each image to forget, if they are.

    Args:
        config: The section ``unlearn``, with all defaults filled in.
        order: Order of the forgotten images.
        images: The forgotten images in the cache; None for those that are in memory.
        count: Number of images to forget.
    """
    settings = config.unlearn
    assert settings.steps is not None
    unseen = count - order.shown(settings.steps)
    if unseen == 0 or not METHOD_SPECS[settings.method].needs(config).forget:
        return None
    if images is None or images.chosen is None:
        needed, more = order.steps_to_show_all(), ""
    else:
        needed = -(-count // settings.batch_size)
        # How many of them have which size is not known.
        more = " or more" if order.num_buckets > 1 else ""
    return (
        f"Warning: in {settings.steps:,} steps of {settings.batch_size} the run never sees {unseen:,} of the {count:,} "
        f"images to forget; --steps {needed}{more} shows each of them once."
    )

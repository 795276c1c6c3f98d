"""What is to be forgotten and what is to be kept."""

from collections.abc import Iterable

from torch import Tensor

from erasediff.data.images import Images
from erasediff.errors import UserError


def forget_retain_split(
    images: Images, forget_classes: Iterable[int], retain_classes: Iterable[int] | None = None
) -> tuple[Images, Images]:
    """(forget, retain): the images of ``forget_classes``, and those of ``retain_classes`` or of all other classes.

    UserError for a class that no image has, a set that comes out empty, and sets that overlap.
    """
    present = sorted(set(images.class_labels.tolist()))
    forgotten = list(forget_classes)
    retained = [c for c in present if c not in forgotten] if retain_classes is None else list(retain_classes)
    _check_exist([*forgotten, *retained], present)
    if not forgotten:
        raise UserError(f"Nothing to forget: name at least one class of {_listed(present)}.")
    if not retained:
        raise UserError("Nothing is left to retain: forget fewer classes.")
    forget, retain = images.of_classes(forgotten), images.of_classes(retained)
    check_disjoint(forget.ids, retain.ids)
    return forget, retain


def check_disjoint(forget_ids: Tensor, retain_ids: Tensor) -> None:
    """UserError if an image is in both sets: it would be forgotten and relearned at once."""
    shared = set(forget_ids.tolist()) & set(retain_ids.tolist())
    if shared:
        raise UserError(
            f"The forget set and the retain set share {len(shared)} of {len(forget_ids)} forgotten images: "
            "take them out of one of the two."
        )


def _check_exist(classes: list[int], present: list[int]) -> None:
    unknown = [c for c in classes if c not in present]
    if unknown:
        raise UserError(f"There is no class {_listed(unknown)} in the data: choose from {_listed(present)}.")


def _listed(classes: list[int]) -> str:
    return ", ".join(map(str, classes))

"""Classes of a data set, by name or number."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from erasediff.errors import UserError


def class_numbers(requested: Iterable[int | str], names: Sequence[str], of: str = "the data") -> tuple[int, ...]:
    """Numbers of the ``requested`` classes, in their order, each once.

    Text is a name if a class has it, else a number.

    Args:
        requested: Names or numbers of classes.
        names: The name of each class, by its number.
        of: What the classes are of, for the error message.

    Raises:
        UserError: There is no such class, with near matches, or no class at all.
    """
    numbers = {name: number for number, name in enumerate(names)}
    found = []
    for wanted in requested:
        if not names:
            raise UserError(
                f"There is no class {wanted} in {of}, since there are none: put the images of each into a folder, or "
                "choose by file."
            )
        text = str(wanted).strip()
        is_number = text.isascii() and text.isdecimal() and int(text) < len(names)
        if isinstance(wanted, str) and text in numbers:
            found.append(numbers[text])
        elif is_number:
            found.append(int(text))
        else:
            raise UserError(f"There is no class {text} in {of}: choose from {_near(text, names)}{several_hint(text)}.")
    return tuple(dict.fromkeys(found))


def several_hint(wanted: str) -> str:
    """How several classes are named, for the end of the sentence about one that looks like a list of them."""
    return "; to name several, give the flag once for each" if "," in wanted else ""


def _near(wanted: str, names: Sequence[str]) -> str:
    """Names like ``wanted`` in any case, or all of them, at most twenty."""
    folded = {name.casefold(): name for name in names}
    near = [folded[match] for match in difflib.get_close_matches(wanted.casefold(), folded)]
    listed = near or names
    return ", ".join(listed[:20]) + (f" and {len(listed) - 20} more" if len(listed) > 20 else "")

"""Faults that a verification finds: what differs, what was expected, and what is there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

TOLERANCE = 1e-9
"""Relative difference of sums in float64 that are taken in another order."""
SHOWN = 100
"""Characters of a value that a fault shows."""
NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Fault:
    """Difference between what a receipt says and what is there.

    Attributes:
        what: Name of the file, tensor or figure.
        expected: By the receipt.
        found: Derived again.
    """

    what: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.what}: expected {self.expected}, found {self.found}"


def differences(what: str, expected: Any, found: Any) -> Iterator[Fault]:
    """Faults of the leaves in which two JSON values differ, named by the way to them; numbers to ``TOLERANCE``."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        for key in sorted(expected.keys() | found.keys()):
            yield from differences(f"{what}, {key}", expected.get(key), found.get(key))
    elif not _equal(expected, found):
        yield Fault(what, shown(expected), shown(found))


def file_differences(prefix: str, expected: Any, found: Mapping[str, Any]) -> Iterator[Fault]:
    """Faults of files described by ``describe_files``: each by its name, each tensor by its own.

    Args:
        prefix: Stands before the names of files.
        expected: Description in the receipt.
        found: Description of the files of these names that are there.
    """
    expected = expected if isinstance(expected, Mapping) else {}
    for name in sorted(expected.keys() | found.keys()):
        recorded, present = expected.get(name), found.get(name)
        if not isinstance(recorded, Mapping) or present is None:
            yield Fault(f"{prefix}{name}", _presence(recorded), _presence(present))
            continue
        yield from differences(f"{prefix}{name}", _file_alone(recorded), _file_alone(present))
        tensors = recorded.get("tensors"), present.get("tensors")
        if None in tensors and tensors[0] != tensors[1]:
            yield Fault(f"{prefix}{name}", *("tensors" if side else "no readable tensors" for side in tensors))
            continue
        before, after = (side if isinstance(side, Mapping) else {} for side in tensors)
        for tensor in sorted(before.keys() | after.keys()):
            yield from differences(f"{prefix}{name}, tensor {tensor}", before.get(tensor), after.get(tensor))


def shown(value: Any) -> str:
    """A value of a fault, in one line and shortened."""
    text = NOTHING if value is None else str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _file_alone(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: record.get(key) for key in ("bytes", "sha256")}


def _presence(record: Any) -> str:
    return "no such file" if record is None else "the file"


def _equal(expected: Any, found: Any) -> bool:
    if isinstance(expected, bool) or isinstance(found, bool) or type(expected) is not type(found):
        return expected is found or (
            not isinstance(expected, bool | str) and not isinstance(found, bool | str) and bool(expected == found)
        )
    if isinstance(expected, float):
        return math.isclose(expected, found, rel_tol=TOLERANCE)
    return bool(expected == found)

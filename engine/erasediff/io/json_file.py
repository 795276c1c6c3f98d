"""Strict JSON: the one reader of every JSON text that comes from outside of the process."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from erasediff.errors import UserError
from erasediff.io.file_faults import fault_of
from erasediff.io.user_file import MEGABYTE, read_bytes

LARGEST = 100 * MEGABYTE
MAX_DEPTH = 64
MAX_DIGITS = 40
"""Of a whole number: transformers writes 10^30 for the length of a text without a limit."""


def parse_json(text: str | bytes, *, infinity: bool = False) -> Any:
    """Parse JSON that every reader understands alike.

    Args:
        text: A document; bytes as UTF-8.
        infinity: Take ``Infinity`` and ``-Infinity``, which are no JSON, but which diffusers writes for schedulers.

    Raises:
        ValueError: It is no JSON; holds NaN or a number too large for any setting, one key with two values, or
            text that is no Unicode; or is nested too deep. The message is a clause such as "it holds NaN".
    """

    decoder = WITH_INFINITY if infinity else STRICT
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
        content = decoder.decode(decoded)
        # Each is a pass over all of it, which a million short rows seldom need.
        if decoded.count("[") + decoded.count("{") > MAX_DEPTH:
            _check_depth(content)
        if "\\u" in decoded:
            # Halves of surrogate pairs, which no file name or terminal takes.
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise ValueError("it is not in UTF-8") from None
    except UnicodeEncodeError:
        raise ValueError("it holds text that is no Unicode") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error})") from None
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    return content


def parse_object(text: str | bytes, *, infinity: bool = False) -> dict[str, Any]:
    """Parse a JSON object. Arguments and ``ValueError`` as for ``parse_json``."""
    content = parse_json(text, infinity=infinity)
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    return content


def read_object(path: Path, *, infinity: bool = False) -> dict[str, Any]:
    """Read a file with one JSON object.

    Raises:
        UserError: The file is damaged, as ``parse_json`` finds it, or is none that can be read.
        FileNotFoundError: There is no such file.
    """
    try:
        return parse_object(read_bytes(path, LARGEST), infinity=infinity)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {fault_of(path) or error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {fault_of(path) or f'it is damaged: {error}'}.") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        for key, value in pairs:
            if repr(content[key]) != repr(value):
                _refuse(f"it gives {shortened(key)} two values")
    return content


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refuse(f"it holds {shortened(digits)}, which is too large a number")


def _bounded(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        _refuse(f"it holds {shortened(digits)}, which is too large a number")
    return int(digits)


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    _refuse(f"it is nested more than {MAX_DEPTH} deep")


def shortened(text: str) -> str:
    """``text`` in at most 40 characters."""
    return text if len(text) <= 40 else f"{text[:37]}..."


def _refuse(reason: str) -> NoReturn:
    raise ValueError(reason)


def _refused_constant(word: str) -> NoReturn:
    _refuse(f"it holds {word}, which is no number of JSON")


def _infinite(word: str) -> float:
    return _refused_constant(word) if word == "NaN" else float(word)


HOOKS: dict[str, Any] = {
    "parse_float": _finite,
    "parse_int": _bounded,
    "object_pairs_hook": _without_duplicates,
}
STRICT = json.JSONDecoder(parse_constant=_refused_constant, **HOOKS)
WITH_INFINITY = json.JSONDecoder(parse_constant=_infinite, **HOOKS)

"""Canonical JSON: one text for one content, so that it can be hashed and signed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

DIGEST = "sha256"
"""Key of a document's own hash."""


def canonical_json(content: Mapping[str, Any]) -> bytes:
    """JSON in ASCII with sorted keys, an indentation of one space, the shortest digits of each number, a line feed.

    Raises:
        ValueError: A number is not finite.
    """
    return (json.dumps(content, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


def content_sha256(content: Mapping[str, Any]) -> str:
    """SHA-256 in hex of the canonical form of ``content`` without its own hash."""
    return hashlib.sha256(canonical_json({k: v for k, v in content.items() if k != DIGEST})).hexdigest()

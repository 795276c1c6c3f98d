"""What the Hugging Face hub's library has in its cache or can download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from erasediff.errors import UserError


def downloaded(repository: str, patterns: Sequence[str], ignored: Sequence[str] = ()) -> Path:
    """The folder of a repository's files that match ``patterns``. UserError, in one sentence, if they cannot be had."""
    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns), ignore_patterns=list(ignored)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"{repository} is no folder here, and it is neither in the cache of the Hugging Face hub nor can it be "
            "downloaded: check the name, the connection, and whether the model asks for a login."
        ) from error

"""Cache directory of encoded images, embeddings and trained base models."""

import os
from pathlib import Path

ENVIRONMENT_VARIABLE = "ERASEDIFF_CACHE"


def cache_folder() -> Path:
    """Path of the cache: ``$ERASEDIFF_CACHE``, or ``erasediff`` in the user's cache."""
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "erasediff"

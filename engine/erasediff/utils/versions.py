"""Versions of the libraries that a result depends on."""

from importlib.metadata import version


def library_versions(*more: str) -> dict[str, str]:
    """Installed versions by distribution: erasediff, torch, diffusers, and ``more``."""
    return {name: version(name) for name in ("erasediff", "torch", "diffusers", *more)}

"""Faults of a file that show without its format: a pointer, a page of an error, a broken link, nothing at all."""

from __future__ import annotations

from pathlib import Path

GIT_LFS = b"version https://git-lfs.github.com/spec/"
WEB_PAGE = (b"<!doctype html", b"<html")


def fault_of(path: Path) -> str | None:
    """Describe what ``path`` is in place of the file that it should be, and what to do; None if nothing shows."""
    if path.is_symlink() and not path.exists():
        return "it is a link to a file that is not there; download it again"
    if not path.exists():
        return "its download is not complete; finish it" if _partial(path).exists() else None
    if not path.is_file():
        return "it is not a file"
    try:
        with path.open("rb") as file:
            head = file.read(len(GIT_LFS))
    except OSError as error:
        return (error.strerror or str(error)).lower()
    if not head:
        return "it is empty; download it again"
    if head.startswith(GIT_LFS):
        return "it is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
    if head.lower().startswith(WEB_PAGE):
        return "it is a web page, not the file itself; download it again"
    return None


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.incomplete")

"""Changes to valid files: to JSON by its structure, headers of safetensors, bytes, and the files themselves."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

LONG_NAME = "n" * 300
NUMBERS: tuple[Any, ...] = (0, 1, -1, 2, 3, 7, 31, 33, 255, 2**31, 2**63, -(2**63) - 1, 10**12, 10**30)
FLOATS: tuple[Any, ...] = (0.0, -0.0, 0.5, 1e-300, 1e308, -1e308, float("nan"), float("inf"), float("-inf"))
PATHS = ("..", "../..", "/", "/etc/passwd", "a/b", "a\\b", "C:\\x", "\0", "a\0b", "~", "CON", LONG_NAME, "-", "--", ".")
WORDS = (
    *(
        "",
        " ",
        "a",
        "0",
        "true",
        "null",
        "nan",
        "é",
        "猫",
        "\ud800",
        "\x1b[31m",
        "a\nb",
        "{class}",
        "{",
        "%s",
        "re:(",
        "cpu",
    ),
    *("diffusers", "transformers", "torch", "os", "UNet2DModel", "CLIPTokenizer", "DDPMPipeline", "DDIMScheduler"),
    *("float16", "F32", "BF16", "F8_E4M3", "U16", "C64", "I64", "X9", "silu", "learned_range", "sample", "linear"),
)
SCALARS = (None, True, False, *NUMBERS, *FLOATS, *WORDS, *PATHS)
"""Values that types allow and that few programs expect."""

scalars = st.sampled_from(SCALARS) | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from((*WORDS, *PATHS)), inner, max_size=3),
    max_leaves=4,
) | st.just(json.loads("[" * 60 + "]" * 60))

CONTENTS = (
    *(b"", b"\0", b"\0" * 64, b"null", b"[]", b"{}", b"1", b'"x"', b"{" * 3000, b"[" * 100_000, b"\xff\xfe\x00"),
    *(b"\xef\xbb\xbf{}", b'{"a": NaN}', b'{"a": 1e999}', b'{"a": 1' + b"0" * 6000 + b"}", b'{"a": 1, "a": 2}', b"\r\n"),
    *(b"<!DOCTYPE html><html></html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
    *(b"%!PS-Adobe-3.0\n", b"\x89PNG\r\n\x1a\n", b"\x80\x04.", b"PK\x03\x04", b"\x08\0\0\0\0\0\0\0{}      "),
    *(b"\xff" * 8, b"\x02\0\0\0\0\0\0\0{}", b"\0\0\0\0\x01\0\0\0", b"a,b\n1", b"%YAML 9.9\n---\n", b"---\n---\n"),
)


class Change(NamedTuple):
    """A change to one file of a folder.

    Attributes:
        kind: Name of a function below.
        file: Number of the file, modulo how many there are.
        at: Place in it.
        value: What is put there.
    """

    kind: str
    file: int
    at: int
    value: Any


def changes(*kinds: str, most: int = 3) -> st.SearchStrategy[list[Change]]:
    """One to ``most`` changes of these kinds, by default of all."""
    places = st.integers(0, 2**16)
    chosen = kinds or tuple(KINDS)
    change = st.sampled_from(chosen).flatmap(
        lambda kind: st.builds(Change, st.just(kind), places, places, values if kind in STRUCTURAL else st.none())
    )
    return st.lists(change, min_size=1, max_size=most)


def apply(folder: Path, found: list[Change]) -> None:
    """Change files of ``folder``, or ``folder`` itself where it is a file."""
    for change in found:
        # What an earlier change has put in their place is none of the valid files, nor is what a link leads to.
        if folder.is_symlink():
            return
        root = folder.resolve()
        files = sorted(folder.rglob("*")) if folder.is_dir() else [folder]
        files = [path for path in files if path.is_file() and path.resolve() == root / path.relative_to(folder)]
        if files:
            KINDS[change.kind](files[change.file % len(files)], change.at, change.value)


def _write(path: Path, content: bytes) -> None:
    # A new file: the old one may be a hard link to the valid one.
    path.unlink()
    path.write_bytes(content)


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key of a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _nodes(value[key])


def _documents(path: Path) -> tuple[list[Any], Callable[[list[Any]], bytes]] | None:
    """The JSON in a file (of a safetensors header, of each line) and how to write it back; None for other files."""
    content = path.read_bytes()
    try:
        if path.suffix == ".safetensors":
            length = int.from_bytes(content[:8], "little")
            return [json.loads(content[8 : 8 + length])], lambda new: _with_header(content[8 + length :], *new[:1])
        if path.suffix == ".jsonl":
            lines = content.decode().splitlines()
            return [json.loads(line) for line in lines], lambda new: b"".join(_dumped(row) + b"\n" for row in new)
        if path.suffix == ".json":
            return [json.loads(content)], lambda new: _dumped(*new[:1])
    except (ValueError, RecursionError):
        return None
    return None


def _dumped(value: Any = None) -> bytes:
    return json.dumps(value).encode()


def _with_header(data: bytes, header: Any = None) -> bytes:
    text = _dumped(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def _structural(edit: Callable[[Any, Any, Any, list[tuple[Any, Any]]], None]) -> Callable[[Path, int, Any], None]:
    """A change to one node of the JSON in a file; in other files, to a byte."""

    def change(path: Path, at: int, value: Any) -> None:
        read = _documents(path)
        nodes = [] if read is None else list(_nodes(read[0]))
        if read is None or not nodes:
            flip(path, at, value)
            return
        container, key = nodes[at % len(nodes)]
        edit(container, key, value, nodes)
        _write(path, read[1](read[0]))

    return change


def _set(container: Any, key: Any, value: Any, nodes: list[tuple[Any, Any]]) -> None:
    container[key] = value


def _delete(container: Any, key: Any, value: Any, nodes: list[tuple[Any, Any]]) -> None:
    del container[key]


def _rename(container: Any, key: Any, value: Any, nodes: list[tuple[Any, Any]]) -> None:
    if isinstance(container, dict):
        container[value if isinstance(value, str) else str(value)] = container.pop(key)
    else:
        container.insert(key, value)


def _wrap(container: Any, key: Any, value: Any, nodes: list[tuple[Any, Any]]) -> None:
    container[key] = [container[key]] if value else {"a": container[key]}


def _exchange(container: Any, key: Any, value: Any, nodes: list[tuple[Any, Any]]) -> None:
    other, name = nodes[len(str(value)) % len(nodes)]
    container[key] = json.loads(json.dumps(other[name]))


def repeat_key(path: Path, at: int, value: Any) -> None:
    """Say a key twice."""
    content = path.read_bytes()
    opening = content.find(b"{")
    _write(
        path,
        content[: opening + 1] + b'"_class_name": ' + _dumped(value) + b', "x": 1, "x": 2,' + content[opening + 1 :],
    )


def flip(path: Path, at: int, value: Any) -> None:
    """Change one byte."""
    content = bytearray(path.read_bytes())
    if content:
        content[(at * 7919) % len(content)] ^= 1 << at % 8 or 1
    _write(path, bytes(content))


def flip_early(path: Path, at: int, value: Any) -> None:
    """Change one byte of the first ones, where headers are."""
    content = bytearray(path.read_bytes())
    if content:
        content[at % min(len(content), 64)] = (at >> 8) % 256
    _write(path, bytes(content))


def cut(path: Path, at: int, value: Any) -> None:
    """Truncate."""
    content = path.read_bytes()
    _write(path, content[: (at * 7919) % (len(content) + 1)])


def lengthen(path: Path, at: int, value: Any) -> None:
    """Append something."""
    _write(path, path.read_bytes() + CONTENTS[at % len(CONTENTS)])


def fill(path: Path, at: int, value: Any) -> None:
    """Overwrite the end with ones: NaN in every floating type."""
    content = path.read_bytes()
    count = len(content) // (2 + at % 8)
    _write(path, content[: len(content) - count] + b"\xff" * count)


def replace(path: Path, at: int, value: Any) -> None:
    """Put another content in its place."""
    _write(path, CONTENTS[at % len(CONTENTS)])


def remove(path: Path, at: int, value: Any) -> None:
    """Remove it."""
    path.unlink()


def rename(path: Path, at: int, value: Any) -> None:
    """Give it another name."""
    names = (
        "x",
        "é.json",
        "..x",
        "model.safetensors",
        "x.bin",
        "-",
        "a b",
        "n" * 255,
        path.name.upper(),
        path.name + ".part",
    )
    path.rename(path.with_name(names[at % len(names)]))


def copy_over(path: Path, at: int, value: Any) -> None:
    """Copy it over a file beside, or from another folder."""
    others = sorted(other for other in path.parent.parent.rglob("*") if other.is_file() and not other.is_symlink())
    if others and (other := others[at % len(others)]) != path:
        _write(path, other.read_bytes())


def folder_instead(path: Path, at: int, value: Any) -> None:
    """Put a folder in its place."""
    path.unlink()
    path.mkdir()
    if at % 2:
        (path / "x.json").write_text("{}")


def special_instead(path: Path, at: int, value: Any) -> None:
    """Put a pipe or a socket in its place."""
    path.unlink()
    os.mknod(path, (stat.S_IFIFO, stat.S_IFSOCK)[at % 2] | 0o600)


def link_instead(path: Path, at: int, value: Any) -> None:
    """Put a link in its place: to nothing, itself, a device, its folder, elsewhere."""
    targets = ("nowhere", path.name, "/dev/zero", "/dev/null", ".", "..", "/etc/hostname", "/proc/self/mem")
    path.unlink()
    path.symlink_to(targets[at % len(targets)])


def special_beside(path: Path, at: int, value: Any) -> None:
    """Add a file, folder, pipe or link beside it, under a name that means something."""
    names = (
        "README.md",
        "LICENSE",
        "model.safetensors.index.json",
        "merges.txt",
        "x.json",
        "metadata.jsonl",
        "metadata.csv",
    )
    other = path.with_name(names[at % len(names)])
    if not os.path.lexists(other):
        makers: tuple[Callable[[], object], ...] = (
            lambda: other.write_bytes(CONTENTS[(at // 7) % len(CONTENTS)]),
            lambda: other.mkdir(),
            lambda: os.mkfifo(other),
            lambda: other.symlink_to("/dev/zero"),
            lambda: other.symlink_to(other.name),
            lambda: shutil.copyfile(path, other),
        )
        makers[(at // 49) % len(makers)]()


STRUCTURAL: dict[str, Callable[[Path, int, Any], None]] = {
    "set": _structural(_set),
    "delete": _structural(_delete),
    "rename_key": _structural(_rename),
    "wrap": _structural(_wrap),
    "exchange": _structural(_exchange),
    "repeat_key": repeat_key,
}
BYTES: dict[str, Callable[[Path, int, Any], None]] = {
    function.__name__: function for function in (flip, flip_early, cut, lengthen, fill, replace)
}
FILES: dict[str, Callable[[Path, int, Any], None]] = {
    function.__name__: function
    for function in (remove, rename, copy_over, folder_instead, special_instead, link_instead, special_beside)
}
KINDS = STRUCTURAL | BYTES | FILES

"""Structure of the source tree: file sizes, unique module names, and the table of folders in CONTRIBUTING.md."""

from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / "engine" / "erasediff"
MAX_LINES = 400
SOURCES = (".py", ".cpp", ".h", ".cu", ".cuh")


def sources(*folders: str) -> list[Path]:
    return [
        path
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in SOURCES and "__pycache__" not in path.parts
    ]


@pytest.mark.parametrize("folder", ["engine", "kernels", "csrc", "tools", "tests", "benchmarks", "examples"])
def test_no_source_file_is_longer_than_400_lines(folder: str) -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources(folder)}
    assert lengths, f"{folder}/ holds no source file"
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}


def test_a_module_name_is_used_once() -> None:
    """A name leads to one file; a command may share its name with the workflow that it calls."""
    places = defaultdict(set)
    for path in sources("engine/erasediff"):
        if path.stem not in ("__init__", "base"):
            places[path.stem].add(path.parent.relative_to(ENGINE).as_posix())
    assert not {
        name: found for name, found in places.items() if len(found) > 1 and found != {"cli/commands", "workflows"}
    }


def test_contributing_names_every_package() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text()
    packages = {path.parent.relative_to(ENGINE).as_posix() for path in ENGINE.rglob("__init__.py")} - {"."}
    assert not {package for package in packages if f"`{package}/`" not in table}

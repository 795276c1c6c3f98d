"""Process groups for all tests of this folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# The processes find what they are to run by its name, in a folder of their own path.
sys.path.insert(0, str(Path(__file__).parent))

from commands import TINY
from commands import run as command
from harness import SECONDS, Group


@pytest.fixture(scope="session")
def run_on() -> Iterator[Callable[..., list[Any]]]:
    """``run_on(size, file, function, *arguments)``: what each of ``size`` processes returns."""
    groups: dict[int, Group] = {}

    def run(size: int, file: Path, function: str, *arguments: Any, seconds: float = SECONDS) -> list[Any]:
        if size not in groups or not groups[size].is_alive:
            groups[size] = Group(size)
        return groups[size].run(file, function, *arguments, seconds=seconds)

    yield run
    for group in groups.values():
        group.close()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The diffusers folder of a model that ``commands.TINY`` describes, trained once. Never written to."""
    home = tmp_path_factory.mktemp("base")
    (home / "tiny.yaml").write_text(TINY)
    command("train", "--out", home / "base", "--config", home / "tiny.yaml")
    return home / "base/model"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

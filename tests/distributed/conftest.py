"""Process groups for all tests of this folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

# The processes find what they are to run by its name, in a folder of their own path.
sys.path.insert(0, str(Path(__file__).parent))

from commands import TINY
from commands import run as command
from harness import SECONDS, Group
from placing import GPUS, on_gpus


def pytest_report_header() -> str:
    deepspeed = version("deepspeed") if find_spec("deepspeed") else "missing"
    places = f"a GPU each for up to {GPUS} processes, the CPU for more" if GPUS else "the CPU for all processes"
    return f"places: {places}; torch {torch.__version__}, DeepSpeed {deepspeed}"


@pytest.fixture(scope="session")
def run_on() -> Iterator[Callable[..., list[Any]]]:
    """``run_on(size, file, function, *arguments)``: what each of ``size`` processes returns.

    widest: of the groups whose results are compared, the number of processes of the largest; ``size`` by default
    """
    groups: dict[tuple[int, bool], Group] = {}

    def run(
        size: int,
        file: Path,
        function: str,
        *arguments: Any,
        widest: int | None = None,
        seconds: float = SECONDS,
    ) -> list[Any]:
        key = size, on_gpus(widest or size)
        if key not in groups or not groups[key].is_alive:
            groups[key] = Group(size, widest)
        return groups[key].run(file, function, *arguments, seconds=seconds)

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

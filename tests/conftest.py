"""Text-to-image checkpoints for all tests: made once per session, never written to."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import run_command
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests find the modules of this folder by their name.
sys.path.insert(0, str(Path(__file__).parent))
# A slow machine is no failure.
settings.register_profile("erasediff", deadline=None)
settings.load_profile("erasediff")


@pytest.fixture(scope="session")
def nano() -> ModuleType:
    """The module ``tests/nano.py``."""
    # Here, since the kernels' tests run where nothing but the kernels is installed.
    import nano

    return nano


@pytest.fixture(scope="session")
def nano_folder(nano: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a nano checkpoint (``nano.NANO``) -> its diffusers folder. Copy it before you change anything in it."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            # diffusers may import DeepSpeed on the way, which has something to say on standard output.
            with redirect_stdout(sys.stderr):
                made[name] = nano.save(name, tmp_path_factory.mktemp("nano") / name)
        return made[name]

    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors of a nano model are too small to be worth more; with more, most of a test is waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run() -> Callable[..., None]:
    """``run(*arguments, code=0)``: the command line, in this process, which ends with that exit code."""

    def command(*arguments: object, code: int = 0) -> None:
        assert run_command(*arguments) == code

    return command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """An empty folder to run in, with the module's ``NANO`` as ``nano.yaml``; the cache is there too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ERASEDIFF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "nano.yaml").write_text(request.module.NANO)
    return tmp_path

"""Text-to-image checkpoints for all tests: made once per session, never written to."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def nano() -> ModuleType:
    """The module ``tests/nano.py``."""
    spec = importlib.util.spec_from_file_location("nano", Path(__file__).with_name("nano.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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

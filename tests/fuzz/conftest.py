"""A working folder for each fuzzed test, and the number of inputs at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import harness
import pytest
import torch


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with the cache in it, while memory is limited."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ERASEDIFF_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with harness.limited_memory():
        yield tmp_path
    torch.set_num_threads(threads)


def pytest_collection_finish(session: pytest.Session) -> None:
    names = [item.name for item in session.items if "fuzz" in item.path.parts]
    harness.shares.update(dict.fromkeys(names, harness.SECONDS / max(1, len(names))))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and harness.SECONDS:
        report.sections.append(("replay", f"FUZZ_SECONDS=5 .venv/bin/pytest '{report.nodeid}'"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, count in harness.counts.items():
        terminalreporter.write_line(f"fuzz: {count:9,} inputs  {name}")
    if harness.counts:
        terminalreporter.write_line(f"fuzz: {harness.counts.total():9,} inputs in all")

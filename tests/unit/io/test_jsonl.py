"""Metrics of resumed runs: no record is lost before its step is taken again."""

from pathlib import Path

import pytest

from erasediff.io.jsonl import MetricsFile


def records(first: int, last: int, value: float = 0.0) -> list[dict[str, float]]:
    return [{"step": step, "loss": value} for step in range(first, last + 1)]


@pytest.fixture
def file(tmp_path: Path) -> MetricsFile:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append(records(1, 6))
    return metrics


def test_later_records_stay_until_their_steps_are_taken_again(file: MetricsFile) -> None:
    resumed = MetricsFile(file.path)
    assert resumed.continue_after(2) == 0
    assert list(resumed.read()) == records(1, 6)
    resumed.append(records(3, 4, 1.0))
    assert list(resumed.read()) == records(1, 2) + records(3, 4, 1.0) + records(5, 6)
    resumed.append(records(5, 8, 1.0))
    resumed.append(records(9, 9, 1.0))
    assert list(resumed.read()) == records(1, 2) + records(3, 9, 1.0)


def test_what_a_kill_or_a_power_loss_leaves_is_dropped_and_counted(file: MetricsFile) -> None:
    content = file.path.read_bytes().split(b"\n")
    content[2] = b"\0" * len(content[2])
    content[3] = b"[3]"
    file.path.write_bytes(b"\n".join(content) + b'{"step": 7, "lo')
    resumed = MetricsFile(file.path)
    assert resumed.continue_after(6) == 2
    assert list(resumed.read()) == [*records(1, 2), *records(5, 6)]
    assert resumed.continue_after(6) == 0


def test_an_intact_file_is_not_written_anew(file: MetricsFile) -> None:
    before = file.path.stat().st_ino
    MetricsFile(file.path).continue_after(6)
    assert file.path.stat().st_ino == before
    assert MetricsFile(file.path.with_name("none.jsonl")).continue_after(0) == 0

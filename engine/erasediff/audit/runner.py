"""Run of an audit: units streamed to JSON lines, shared among ranks, resumed after a kill; cost; outcome."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from erasediff.audit.batteries import Battery
from erasediff.audit.batteries.base import Piece
from erasediff.audit.battery_outcome import BatteryOutcome, Row
from erasediff.audit.subject import Subject
from erasediff.io.atomic import atomic_write
from erasediff.io.jsonl import MetricsFile, dumps
from erasediff.parallel.control_plane import ControlPlane
from erasediff.utils.progress import progress_bar

ROWS_FILE = "audit.jsonl"


@dataclass(frozen=True, slots=True)
class Unit:
    """A battery's piece on one subject: what is measured, written and resumed as a whole."""

    battery: Battery[Any]
    subject: str
    piece: Piece

    @property
    def key(self) -> str:
        """Address in the file of rows."""
        return dumps({"battery": self.battery.name, "subject": self.subject, "piece": dict(self.piece)})

    def measure(self) -> list[Row]:
        """Rows of the unit."""
        with torch.random.fork_rng([]):
            torch.manual_seed(self.battery.seed(self.piece))
            return self.battery.measure(self.battery.audit.subjects[self.subject], self.piece)


class RowsFile:
    """Rows of an audit as JSON lines, one line for each unit, so that a unit is there as a whole or not at all."""

    def __init__(self, path: Path) -> None:
        self._file = MetricsFile(path)

    def read(self) -> dict[str, list[Row]]:
        """Rows of the finished units by key. UserError for a damaged line; one that a kill tore apart goes."""
        lines = list(self._file.read())
        if self._file.path.exists():
            whole = "".join(dumps(line) + "\n" for line in lines)
            if whole.encode() != self._file.path.read_bytes():
                atomic_write(self._file.path, whole)
        return {_key(line): line["rows"] for line in lines}

    def append(self, unit: Unit, rows: Sequence[Row]) -> None:
        """Append a unit and flush it to the disk."""
        record = {"battery": unit.battery.name, "subject": unit.subject, "piece": dict(unit.piece), "rows": list(rows)}
        self._file.append([record])


def _key(line: Mapping[str, Any]) -> str:
    return dumps({name: line[name] for name in ("battery", "subject", "piece")})


def units_of(batteries: Sequence[Battery[Any]]) -> list[Unit]:
    """Units of the batteries that apply, in the order in which they are measured."""
    return [
        Unit(battery, subject, piece)
        for battery in batteries
        if battery.refusal() is None
        for piece in battery.pieces()
        for subject in battery.subjects
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Estimate of a battery's cost on all its subjects."""

    battery: str
    passes: float
    seconds: float


def costs(batteries: Sequence[Battery[Any]]) -> list[Cost]:
    """Estimate of each applicable battery's cost, from one timed pass of each subject."""
    seconds: dict[str, float] = {}
    found = []
    for battery in batteries:
        if battery.refusal() is None:
            for name in battery.subjects:
                if name not in seconds:
                    seconds[name] = seconds_per_pass(battery.audit.subjects[name])
            passes = battery.passes()
            total = sum(passes * seconds[name] for name in battery.subjects)
            found.append(Cost(battery=battery.name, passes=passes * len(battery.subjects), seconds=total))
    return found


@torch.no_grad()
def seconds_per_pass(subject: Subject) -> float:
    """Seconds that the denoiser takes for one sample in a batch of the sampler's size: the second of two passes."""
    count = subject.settings.batch_size
    ids = torch.arange(count)
    condition = {} if subject.model.condition == "none" else subject.condition([subject.any_ask] * count)
    noisy = subject.noise(ids, 0, 0)
    told = subject.process.conditioning[subject.process.num_train_timesteps // 2].expand(count)
    for _ in range(2):
        began = time.perf_counter()
        subject.model.predict(subject.model.denoiser, noisy, told, condition)
        if noisy.is_cuda:
            torch.cuda.synchronize(noisy.device)
    return (time.perf_counter() - began) / count


def run_units(units: Sequence[Unit], path: Path, console: Console) -> dict[str, list[Row]]:
    """Measure the units that the file at ``path`` lacks, and append each; rows of all units by key.

    Ranks take the units in turn and the main one writes them in their order, so that the file is that of one process.

    Raises:
        UserError: The file is damaged, or the disk refuses.
    """
    peers, file = ControlPlane.current(), RowsFile(path)
    with peers.main_process_first():
        done = file.read() if peers.is_main else {}
    missing: list[int] = peers.broadcast_object([n for n, unit in enumerate(units) if unit.key not in done])
    with progress_bar(console, "Audit", len(units), len(units) - len(missing)) as bar:
        for turn in _turns(missing, peers.size):
            own = units[turn[peers.rank]] if peers.rank < len(turn) else None
            if own is not None:
                bar.note(f"{own.battery.name} {own.subject}")
            measured = peers.exchange(None if own is None else own.measure(), patient=True)
            if peers.is_main:
                for number, rows in zip(turn, measured, strict=False):
                    # As they are read back: a resumed audit equals an uninterrupted one.
                    file.append(units[number], rows)
            bar.advance(len(turn))
    return RowsFile(path).read() if peers.is_main else {}


def _turns(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Parts of ``size`` numbers, one for each rank."""
    for first in range(0, len(numbers), size):
        yield numbers[first : first + size]


def outcome_of(battery: Battery[Any], rows_by_key: Mapping[str, Sequence[Row]]) -> BatteryOutcome:
    """Outcome of one battery from the rows of all units."""
    refusal = battery.refusal()
    rows: dict[str, list[Row]] = {}
    for unit in units_of([battery]):
        rows.setdefault(unit.subject, []).extend(rows_by_key[unit.key])
    return BatteryOutcome(
        name=battery.name,
        title=battery.title,
        source=battery.source,
        settings=battery.settings.model_dump(mode="json"),
        refusal=refusal,
        figures=[] if refusal else battery.figures(rows),
        rows=rows,
        description={} if refusal else battery.description(),
    )

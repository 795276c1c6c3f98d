"""Comparison: results file, runs of cases, table and verdict, page."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from erasediff import Process
from erasediff.comparison import Case, ResultsFile, compare
from erasediff.comparison.digits_task import tasks_named
from erasediff.comparison.page import verdict, write_page
from erasediff.comparison.run_case import Cost, artefact_bytes, command, run_case
from erasediff.comparison.table import gaps, markdown, tables
from erasediff.errors import UserError
from erasediff.evaluation.attacks import relearning_curve
from erasediff.evaluation.distances import frechet_distance, gaussian_distance, kernel_distance


def test_frechet_distance_of_gaussians_is_what_their_moments_say() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    moved = 2 * torch.randn(20_000, 3, generator=generator, dtype=torch.float64) + torch.tensor([1.0, 0.0, 2.0])
    # |m|^2 + sum (sigma - sigma')^2
    assert frechet_distance(x, moved) == pytest.approx(5 + 3, rel=0.03)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_unbiased_and_grows_with_the_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    same = [
        kernel_distance(torch.randn(50, 4, generator=generator), torch.randn(60, 4, generator=generator))
        for _ in range(200)
    ]
    mean, error = sum(same) / len(same), torch.tensor(same).std().item() / math.sqrt(len(same))
    assert abs(mean) < 3 * error
    x, y = torch.randn(200, 4, generator=generator), torch.randn(200, 4, generator=generator)
    assert kernel_distance(x, y + 2) > kernel_distance(x, y + 1) > kernel_distance(x, y)


def test_gaussian_distance_is_unbiased_and_has_no_unit() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 4, generator=generator), torch.randn(150, 4, generator=generator)
    found = [
        gaussian_distance(torch.randn(50, 4, generator=generator), torch.randn(60, 4, generator=generator))
        for _ in range(200)
    ]
    assert abs(torch.tensor(found).mean().item()) < 3 * torch.tensor(found).std().item() / 200**0.5
    assert 2 > gaussian_distance(x, y + 9) > gaussian_distance(x, y + 1) > gaussian_distance(x, y)
    assert gaussian_distance(7 * x, 7 * (y + 1)) == pytest.approx(gaussian_distance(x, y + 1), rel=1e-5)


class Batches:
    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        self.batch = batch

    def at(self, step: int) -> dict[str, torch.Tensor]:
        return self.batch


def test_relearning_measures_before_and_at_each_of_the_steps(
    model: nn.Module, process: Process, make_batch: Any
) -> None:
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def moved() -> float:
        return sum(float((p - q).detach().abs().sum()) for p, q in zip(model.parameters(), before, strict=True))

    curve = relearning_curve(model, process, Batches(make_batch(1)), moved, steps=(1, 4), lr=1e-3)
    assert [step for step, _ in curve] == [0, 1, 4]
    assert curve[0][1] == 0 < curve[1][1] < curve[2][1]
    with pytest.raises(ValueError, match="ascending"):
        relearning_curve(model, process, Batches(make_batch(1)), moved, steps=(4, 1), lr=1e-3)


def test_the_artefact_is_the_mask_or_what_changed(tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    for folder in (base / "unet", run / "model" / "unet"):
        folder.mkdir(parents=True)
    weights = {"kept": torch.ones(8), "moved": torch.ones(3)}
    save_file(weights, base / "unet" / "w.safetensors")
    save_file(weights | {"moved": torch.zeros(3)}, run / "model" / "unet" / "w.safetensors")
    assert artefact_bytes(base, run) == 3 * 4
    save_file({"m": torch.ones(1)}, run / "mask.safetensors")
    assert artefact_bytes(base, run) == (run / "mask.safetensors").stat().st_size


def test_a_method_that_leaves_the_model_alone_is_measured_with_what_it_attaches(tmp_path: Path) -> None:
    case = Case(task="t/1", method="saemnesia", seed=0, settings={})
    eraser = tmp_path / case.name / "saemnesia"
    eraser.mkdir(parents=True)
    save_file({"W_enc": torch.ones(5)}, eraser / "sae.safetensors")
    size = (eraser / "sae.safetensors").stat().st_size
    assert artefact_bytes(tmp_path / "base", eraser.parent) == size
    cost = Cost(seconds=2.0, cpu_seconds=1.0, training_seconds=1.0, peak_bytes=None, artefact_bytes=size)
    (eraser.parent / "cost.json").write_text(json.dumps(dataclasses.asdict(cost)))
    assert run_case(case, tmp_path / "base", tmp_path) == (eraser, cost)


def test_a_case_of_other_settings_is_another_case(tmp_path: Path) -> None:
    cases = [Case(task="t/1", method="esd", seed=0, settings={"unlearn.lr": lr}) for lr in (1e-4, 2e-4)]
    assert cases[0].identity() != cases[1].identity()
    assert "--set=unlearn.lr=0.0001" in command(cases[0], tmp_path, tmp_path / "run")


def test_a_case_is_the_same_wherever_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identities = []
    for name in ("here", "there"):
        monkeypatch.setenv("ERASEDIFF_CACHE", str(tmp_path / name))
        data = tmp_path / name / "data"
        case = Case(task="t/1", method="esd", seed=0, settings={"images.data": str(data)})
        assert case.described() == {"images.data": "$ERASEDIFF_CACHE/data"}
        assert f'--set=images.data="{data}"' in command(case, tmp_path, tmp_path / "run")
        identities.append(case.identity())
    assert identities[0] == identities[1]


def line(method: str, forgotten: float, retained: float, **changes: Any) -> dict[str, Any]:
    case = {"task": "toy/1", "method": method, "seed": 0, "settings": "a", "measurement": "quality"}
    values = {"forgotten_rate": forgotten, "retained_mean": retained, "retained_worst": retained}
    return case | {"values": values, "chosen": {"unlearn.lr": 1}, "cost": None} | changes


def test_the_verdict_names_who_is_better_on_both(tmp_path: Path) -> None:
    ours, base, oracle = line("erasediff", 0.02, 0.97), line("base", 1.0, 0.99), line("retrain", 0.0, 1.0)
    (table,) = tables([ours, line("salun", 0.01, 0.96), line("esd", 0.03, 0.98), base, oracle])
    assert [row.method for row in table.rows][:2] == ["base", "retrain"]
    assert "no method" in verdict(table)
    (table,) = tables([ours, line("salun", 0.02, 0.98), base])
    assert "better in one: salun (UA 0.0, RA +1.0 percentage points)" in verdict(table)
    # Of the runs that only one has, nothing is concluded.
    (table,) = tables([ours, line("salun", 0.02, 0.98), line("salun", 0.9, 0.5, seed=1)])
    assert table.better_than("erasediff") == {"salun": (0, pytest.approx(0.01))}
    (table,) = tables([ours, line("salun", 0.0, 0.98, seed=1)])
    assert table.better_than("erasediff") == {}


def test_the_last_settings_count_and_gaps_are_named() -> None:
    relearned = {"measurement": "relearning", "values": {"curve": [[0, 0.0], [5, 0.4]]}}
    old, new = line("esd", 0.5, 0.5), line("esd", 0.1, 0.9, settings="b")
    (table,) = tables([old, line("esd", 0, 0, **relearned), new, line("erasediff", 0.0, 0.9, task="toy/2")])
    row = table.rows[0]
    assert row.numbers["forgotten rate"] == 0.1
    assert row.numbers["steps to relearn"] is None, "of the settings before"
    said = " ".join(gaps(table))
    assert "1 seed of three: " in said
    assert "esd was not run on toy/2" in said
    assert "Not measured: steps to relearn (median)" in said
    (table,) = tables([line("esd", 0.1, 0.9, seed=seed) for seed in range(3)] + [line("salun", 0.1, 0.9)])
    assert "Only 1 seed of three for salun: " in " ".join(gaps(table))


def test_one_run_that_never_relearns_does_not_decide_the_row() -> None:
    """The median of steps to relearn over runs: infinite only where half of the runs never get there."""

    def relearned(seed: int, *rates: float) -> dict[str, Any]:
        curve = [[5 * step, rate] for step, rate in enumerate(rates)]
        return line("esd", 0, 0, seed=seed, measurement="relearning", values={"curve": curve})

    def shown(*runs: tuple[float, ...]) -> str:
        quality = [line("esd", 0.25, 0.9, seed=seed) for seed in range(len(runs))]
        (table,) = tables([*quality, *(relearned(seed, *rates) for seed, rates in enumerate(runs))])
        return markdown(table)

    assert "| 10 |" in shown((0, 0.6), (0, 0.4, 0.6), (0, 0.1, 0.1))
    assert "| never |" in shown((0, 0.6), (0, 0.1), (0, 0.1))
    text = shown((0, 0.6))
    assert "steps to relearn (median)" in text
    assert "| UA | RA |" in text
    assert "| 75.0% | 90.0% |" in text, "UA is the share of forgotten images that are not recognised"


class ToyTask:
    """Two measurements of a model that needs no run."""

    name = "toy/1"

    def __init__(self, base: Path) -> None:
        self.path, self.taken = base, list[str]()

    def base(self, seed: int, console: Console) -> Path:
        return self.path

    def settings(self, method: str) -> Mapping[str, Any]:
        raise UserError(f"no {method}")

    def measurements(self, method: str) -> Mapping[str, Any]:
        def measured(name: str) -> Any:
            def measure(model: Path, case: Case, oracle: Path | None) -> Mapping[str, Any]:
                self.taken.append(name)
                return {"forgotten_rate": 1.0, "retained_mean": 1.0, "retained_worst": 1.0}

            return measure

        return {name: measured(name) for name in ("quality", "other")}


def test_what_has_a_line_is_not_measured_again(tmp_path: Path) -> None:
    lines, task, console = ResultsFile(tmp_path / "lines.jsonl"), ToyTask(tmp_path), Console(quiet=True)
    compare([task], ["base"], [0], lines=lines, runs=tmp_path / "runs", console=console)
    assert task.taken == ["quality", "other"]
    # The second measurement's line is torn by a kill: it alone is taken again.
    text = lines.path.read_text().splitlines(keepends=True)
    lines.path.write_text(text[0])
    compare([task], ["base"], [0], lines=lines, runs=tmp_path / "runs", console=console)
    assert task.taken == ["quality", "other", "other"]
    with pytest.raises(UserError, match="no unheard"):
        compare([task], ["base", "unheard"], [1], lines=lines, runs=tmp_path / "runs", console=console)
    assert len(lines.read()) == 2, "nothing is run before every method is known"


def test_a_method_that_fails_does_not_keep_the_others_from_their_lines(tmp_path: Path) -> None:
    class Failing(ToyTask):
        def settings(self, method: str) -> Mapping[str, Any]:
            return {"unlearn.steps": -1}

    lines, task = ResultsFile(tmp_path / "lines.jsonl"), Failing(tmp_path)
    with pytest.raises(UserError, match=r"2 of 4 cases failed.*unlearn\.steps"):
        compare([task], ["base", "neggrad"], [0, 1], lines=lines, runs=tmp_path / "runs", console=Console(quiet=True))
    assert {(each["method"], each["seed"]) for each in lines.read()} == {("base", 0), ("base", 1)}


def test_a_task_that_does_not_exist_is_a_sentence() -> None:
    with pytest.raises(UserError, match="digits/0 to digits/9"):
        tasks_named(["digits/12"])
    assert len(tasks_named(["digits"])) == 10


def test_the_page_is_drawn_from_the_lines_alone(tmp_path: Path) -> None:
    lines = ResultsFile(tmp_path / "lines.jsonl")
    for each in (line("base", 1.0, 0.99), line("erasediff", 0.0, 0.97), line("salun", 0.1, 0.95)):
        lines.append(each)
    write_page(tmp_path / "report.html", lines, "erasediff compare --seeds '<0>'")
    page = (tmp_path / "report.html").read_text()
    assert "97.0%" in page
    assert "Not measured" in page
    assert "&lt;0&gt;" in page
    assert "http" not in page, "nothing is loaded from elsewhere"


def test_the_short_form_runs_every_part(tmp_path: Path) -> None:
    environment = {**os.environ, "ERASEDIFF_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    asked = [sys.executable, "-m", "erasediff.cli", "compare", "--short", "--out", str(tmp_path / "out"), "--json"]
    finished = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout)
    rows = result["rows"]["digits"]
    assert list(rows) == ["base", "erasediff", "finetune"]
    assert rows["erasediff"]["peak MiB"] > 100 * 2**20
    # Every tensor moves, and the whole network is 0.6 million weights of four bytes.
    assert rows["erasediff"]["artefact MiB"] == rows["finetune"]["artefact MiB"] > 2e6
    assert "steps to relearn" in rows["erasediff"]
    assert Path(result["report"]).read_text().count("<picture>") == 2

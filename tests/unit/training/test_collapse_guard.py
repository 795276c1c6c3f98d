"""A run that destroys what it should keep stops and rolls back; no other run notices that it was looked at."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import folder_weights
from rich.console import Console

from erasediff.config import load_config
from erasediff.errors import RunFailedError
from erasediff.models import PixelModel
from erasediff.training.collapse_guard import DRIFT, RetainedLoss
from erasediff.training.job import TrainingJob
from erasediff.training.run_dir import RunPlace
from erasediff.workflows.build_unlearning import build_unlearning_job

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "threads": 1,
    "unlearn.forget": [3],
    "unlearn.steps": 12,
    "unlearn.batch_size": 4,
    "unlearn.lr_schedule": "constant",
    "run.checkpoint_every": 5,
    "run.look_every": 2,
}
COLLAPSING: dict[str, Any] = {"unlearn.lr": 0.3, "run.drift_limit": 1.1}
"""Drifts 1.06, 1.27 and 1.62 after steps 2, 4 and 6."""

pytestmark = pytest.mark.usefixtures("one_thread")


def job(settings: dict[str, Any] | None = None) -> TrainingJob:
    model = PixelModel.build(num_classes=10, block_out_channels=(8, 8), layers_per_block=1)
    return build_unlearning_job(load_config(None, SETTINGS | (settings or {})), model)


def run(job: TrainingJob, out: Path, *, resuming: bool = False) -> str:
    """What a run of ``job`` printed."""
    console = Console(file=io.StringIO(), width=400)
    job.run(RunPlace(out, resuming=resuming), console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def stop_after(job: TrainingJob, step: int) -> TrainingJob:
    take = job.method.step

    def stopping(*batches: Any) -> Any:
        if job.method.iteration == step:
            raise KeyboardInterrupt
        return take(*batches)

    job.method.step = stopping  # type: ignore[method-assign]
    return job


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = folder_weights(one), folder_weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("method", ["erasediff", "selective-amnesia"])
def test_looks_change_no_bit_of_a_run(tmp_path: Path, method: str) -> None:
    for every in (0, 1):
        run(job({"unlearn.method": method, "run.look_every": every, "run.drift_limit": 1e9}), tmp_path / str(every))
    assert_same_weights(tmp_path / "0/model", tmp_path / "1/model")
    plain, looked = records(tmp_path / "0"), records(tmp_path / "1")
    assert all(math.isfinite(record.pop(DRIFT)) for record in looked)
    assert looked == plain
    manifests = [(tmp_path / name / "checkpoint-10/manifest.json").read_text() for name in ("0", "1")]
    assert manifests[0] == manifests[1]


def test_a_collapsing_run_stops_with_the_weights_of_the_last_good_look(tmp_path: Path) -> None:
    collapsing, out = job(COLLAPSING), tmp_path / "run"
    with pytest.raises(RunFailedError) as failed:
        run(collapsing, out)
    assert collapsing.method.iteration == 6
    said = str(failed.value)
    assert "no longer denoised after step 6" in said
    assert "lower the learning rate (now 0.3), eta (now 0.5) or the number of steps" in said
    assert said.endswith(f" are in {out / 'rolled-back/model'}.")
    assert "the weights of step 2 (" in said
    assert not (out / "model").exists()
    assert [DRIFT in record for record in records(out)] == [False, True] * 3
    run(job(COLLAPSING | {"unlearn.steps": 2}), tmp_path / "short")
    assert_same_weights(out / "rolled-back/model", tmp_path / "short/model")


def test_one_look_beyond_the_limit_stops_a_run_only_at_its_end(tmp_path: Path) -> None:
    """Of the looks after steps 4 and 6, the one after 4 alone is beyond the limit."""
    transient = {"unlearn.lr": 0.3, "run.look_every": 4, "run.drift_limit": 1.2}
    run(job(transient), tmp_path / "whole")
    assert [record[DRIFT] > 1.2 for record in records(tmp_path / "whole") if DRIFT in record] == [True, False, False]
    with pytest.raises(RunFailedError, match=r"after step 4, .* so no weights were saved\.$"):
        run(job(transient | {"unlearn.steps": 4}), tmp_path / "short")
    assert not list((tmp_path / "short").glob("*/model"))


def test_a_resumed_run_is_looked_at_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    lasting = {"run.drift_limit": 1e9}
    run(job(lasting), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(stop_after(job(lasting), 7), tmp_path / "parts")
    run(job(lasting), tmp_path / "parts", resuming=True)
    assert (tmp_path / "parts/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert_same_weights(tmp_path / "parts/model", tmp_path / "whole/model")


@pytest.mark.parametrize("has_looks", [True, False], ids=["", "of an older version"])
def test_looks_before_a_resumption_count(tmp_path: Path, has_looks: bool) -> None:
    """The look after step 4 was beyond the limit, and the checkpoint is of step 5."""
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(stop_after(job(COLLAPSING), 5), out)
    if not has_looks:
        lines = [json.dumps({k: v for k, v in record.items() if k != DRIFT}) + "\n" for record in records(out)]
        (out / "metrics.jsonl").write_text("".join(lines))
    resumed = job(COLLAPSING | ({} if has_looks else {"run.look_every": 1}))
    with pytest.raises(RunFailedError, match=f"after step {6 if has_looks else 7}, .* no weights were saved"):
        run(resumed, out, resuming=True)


def test_the_weights_that_a_run_is_resumed_from_can_be_rolled_back_to(tmp_path: Path) -> None:
    settings = COLLAPSING | {"run.checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        run(stop_after(job(settings), 2), tmp_path / "run")
    with pytest.raises(RunFailedError, match=r"after step 6, .* the weights of step 2 \("):
        run(job(settings), tmp_path / "run", resuming=True)
    assert (tmp_path / "run/rolled-back/model").is_dir()


@pytest.mark.parametrize("method", ["neggrad"])
def test_a_method_without_retained_images_says_that_nothing_is_watched(tmp_path: Path, method: str) -> None:
    said = run(job({"unlearn.method": method, "unlearn.steps": 2}), tmp_path / "run")
    assert said.count("trains on no retained images") == 1
    assert not any(DRIFT in record for record in records(tmp_path / "run"))


def test_the_loss_is_that_of_the_same_samples_whatever_the_micro_batches() -> None:
    losses = []
    for parts in (1, 2, 4):
        made = job({"unlearn.accumulation_steps": parts, "unlearn.min_snr_gamma": 5.0 if parts == 4 else None})
        loss = RetainedLoss(made.method, map(made.retain.at, range(4)))
        losses.append(float(loss.evaluate()))
        random = torch.get_rng_state()
        assert float(loss.evaluate()) == losses[-1]
        assert torch.equal(torch.get_rng_state(), random)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_an_original_without_a_finite_loss_is_no_reference(tmp_path: Path) -> None:
    broken = job()
    at = broken.retain.at

    class Broken:
        def at(self, step: int) -> Any:
            batch = at(step)
            return {**batch, "sample": batch["sample"] * math.nan} if step == 0 else batch

    object.__setattr__(broken, "retain", Broken())
    run(broken, tmp_path / "run")
    assert not any(DRIFT in record for record in records(tmp_path / "run"))

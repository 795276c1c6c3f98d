"""A run that diverged or changed nothing fails: no model is written, and its checkpoints stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from erasediff.config import load_config
from erasediff.errors import RunFailedError, UserError
from erasediff.models import PixelModel
from erasediff.training.checkpoint import Checkpoint, snapshot_of
from erasediff.training.job import RunResult, TrainingJob
from erasediff.training.loop import check_skipped_steps
from erasediff.training.run_dir import RunPlace
from erasediff.workflows.build_unlearning import build_unlearning_job
from erasediff.workflows.train_pixel import training_job

QUIET = Console(quiet=True)
STEPS = 12
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "threads": 1,
    "unlearn.forget": [3],
    "unlearn.steps": STEPS,
    "unlearn.batch_size": 4,
    "run.checkpoint_every": 5,
}

pytestmark = pytest.mark.usefixtures("one_thread")


def job(**settings: Any) -> TrainingJob:
    named = {key.replace("__", "."): value for key, value in settings.items()}
    model = PixelModel.build(num_classes=10, block_out_channels=(8, 8), layers_per_block=1)
    return build_unlearning_job(load_config(None, SETTINGS | named), model)


def poison_losses(job: TrainingJob, steps: set[int]) -> TrainingJob:
    """Make the batches of ``steps`` NaN."""
    at = job.retain.at

    class Poisoned:
        def at(self, step: int) -> Any:
            batch = dict(at(step))
            return batch | ({"sample": batch["sample"] * float("nan")} if step in steps else {})

    object.__setattr__(job, "retain", Poisoned())
    return job


def run(job: TrainingJob, out: Path, *, resuming: bool = False) -> RunResult:
    return job.run(RunPlace(out, resuming=resuming), QUIET)


@pytest.mark.parametrize("method", ["erasediff", "finetune", "salun", "selective-amnesia"])
def test_a_diverged_run_fails_and_keeps_its_checkpoints(tmp_path: Path, method: str) -> None:
    with pytest.raises(RunFailedError, match=r"[5-9] of [6-9] steps were skipped .* no model was saved: lower the"):
        run(job(unlearn__lr=1e30, unlearn__method=method), tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint-5",
        "config.yaml",
        "forget.jsonl",
        "metrics.jsonl",
        "retain.jsonl",
    ]


def test_one_skipped_step_in_twelve_is_a_success_and_two_are_not(tmp_path: Path) -> None:
    result = run(poison_losses(job(), {4}), tmp_path / "one")
    assert result.metrics["skipped"] == 1
    with pytest.raises(RunFailedError, match=r"2 of \d+ steps were skipped"):
        run(poison_losses(job(), {4, 7}), tmp_path / "two")


def test_a_run_that_has_skipped_too_many_steps_does_not_take_the_others(tmp_path: Path) -> None:
    hopeless = poison_losses(job(run__log_every=2), {0, 1})
    with pytest.raises(RunFailedError, match="2 of 2 steps were skipped"):
        run(hopeless, tmp_path / "run")
    assert hopeless.method.iteration == 2
    assert not (tmp_path / "run/model").exists()


def test_steps_skipped_before_a_resumption_count(tmp_path: Path) -> None:
    stopped = poison_losses(job(), {1, 2})
    step = stopped.method.step

    def stop(*batches: Any) -> Any:
        if stopped.method.iteration == 5:
            raise KeyboardInterrupt
        return step(*batches)

    stopped.method.step = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(stopped, tmp_path / "run")
    for _ in range(2):
        with pytest.raises(RunFailedError, match=r"2 of \d+ steps were skipped"):
            run(job(), tmp_path / "run", resuming=True)
    assert not (tmp_path / "run/model").exists()


def test_training_from_scratch_that_diverges_fails(tmp_path: Path) -> None:
    settings = {"device": "cpu", "threads": 1, "train.steps": 4, "train.batch_size": 4, "train.lr": 1e30}
    small = {"model.block_out_channels": [8, 8], "model.layers_per_block": 1}
    with pytest.raises(RunFailedError, match="3 of 4 steps were skipped"):
        run(training_job(load_config(None, settings | small)), tmp_path / "run")
    assert not (tmp_path / "run/model").exists()


def test_a_run_that_changed_no_weight_fails(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match="No weight of the model changed"):
        run(job(unlearn__lr=1e-60), tmp_path / "run")
    assert not (tmp_path / "run/model").exists()


def test_the_size_of_the_update_is_told(tmp_path: Path) -> None:
    trained = job(unlearn__ema_decay=0.5)
    before = torch.cat([p.detach().flatten().clone() for p in trained.network.parameters()])
    result = run(trained, tmp_path / "run")
    saved = PixelModel.load(result.model).unet
    after = torch.cat([p.detach().flatten() for p in saved.parameters()])
    assert result.weights_changed == pytest.approx(float((after != before).float().mean()))
    assert result.relative_update == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3)


@pytest.mark.parametrize("shared", [False, True], ids=["whole", "shards"])
@pytest.mark.parametrize("entry", ["weight", "ema"])
def test_a_checkpoint_that_is_not_finite_is_named_when_it_is_resumed(tmp_path: Path, entry: str, shared: bool) -> None:
    diverged = job()
    list(diverged.trial_steps(1))
    parameter = diverged.network.get_parameter("conv_in.weight")
    with torch.no_grad():
        (parameter if entry == "weight" else diverged.optimizer.state[parameter]["ema"]).view(-1)[0] = float("nan")
    checkpoint = Checkpoint(1, tmp_path / "checkpoint-1")
    snapshot_of(diverged.method, diverged.network, shared=shared).save(checkpoint)
    again = job()
    with pytest.raises(UserError, match=r"checkpoint-1 is of a run that diverged: conv_in\.weight"):
        snapshot_of(again.method, again.network, shared=shared).restore(checkpoint)


def test_observations_do_not_hide_skipped_steps() -> None:
    """A method that only looks at first counts the steps after that."""

    class Looked:
        iteration, updates, skipped = 100, 5, torch.tensor(1)

    with pytest.raises(RunFailedError, match="1 of 5 steps"):
        check_skipped_steps(Looked(), 5, Path("run"))  # type: ignore[arg-type]

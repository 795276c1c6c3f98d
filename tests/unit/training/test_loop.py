"""The loop, with a method small enough to see through: resume, interruption, and when the device is read."""

import errno
import io
import os
import random
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from erasediff.config import Config, RunConfig
from erasediff.diffusion import Batch
from erasediff.errors import Interrupted, UserError
from erasediff.io.atomic import publish
from erasediff.methods import StepReport
from erasediff.training.loop import Outcome, run_steps
from erasediff.training.lr_schedule import LearningRate
from erasediff.training.run_dir import RunFolder

STEPS = 13
SECONDS_TO_WAIT = 20.0


class NoisyRegression:
    """A method whose noise comes from torch's global generator, as dropout's does."""

    name = "noisy regression"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1.0)
        self.iteration = 0
        self.after_step: Callable[[int], None] = lambda iteration: None

    def step(self, retain: Batch, forget: Batch) -> StepReport:
        loss = (self.model(retain["sample"] + torch.randn(3))).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.iteration += 1
        self.after_step(self.iteration)
        return StepReport(retain_loss=loss.detach(), finite=torch.tensor(True), skipped=torch.tensor(0))

    def state_dict(self) -> dict[str, Any]:
        return {"iteration": self.iteration, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        self.optimizer.load_state_dict(state["optimizer"])


class Addressed:
    def at(self, step: int) -> Batch:
        return {"sample": torch.full((4, 3), step / 7)}


@dataclass
class TrainingJob:
    """One process's part of a run."""

    run: RunFolder
    settings: RunConfig = field(default_factory=lambda: RunConfig(checkpoint_every=4, keep_checkpoints=2, log_every=3))
    method: NoisyRegression = field(default_factory=NoisyRegression)
    output: io.StringIO = field(default_factory=io.StringIO)
    retain: Addressed = field(default_factory=Addressed)

    def go(self) -> Outcome:
        rate = LearningRate(0.1, STEPS, warmup_steps=2, shape="cosine")
        return run_steps(
            self.method,
            self.method.model,
            self.run,
            steps=STEPS,
            settings=self.settings,
            retain=self.retain,
            before_step=lambda step: rate.apply(self.method.optimizer, step),
            console=Console(file=self.output, width=120),
            title="Regressing",
        )

    def results(self) -> tuple[list[Tensor], list[Tensor], str]:
        moments = [state["exp_avg_sq"] for state in self.method.optimizer.state.values()]
        weights = [parameter.detach() for parameter in self.method.model.parameters()]
        return weights, moments, self.run.metrics.path.read_text()


def assert_same(a: TrainingJob, b: TrainingJob) -> None:
    for ours, theirs in zip(a.results()[:2], b.results()[:2], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
    assert a.results()[2] == b.results()[2]


@pytest.fixture
def uninterrupted(tmp_path: Path) -> TrainingJob:
    job = TrainingJob(RunFolder.create(tmp_path / "whole", Config()))
    job.go()
    return job


class Killed(BaseException):
    pass


def background_threads() -> list[str]:
    """All but those of pytest and of the progress bar, which ends some time after it."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("batches", "checkpoint"))]


def test_the_batches_of_the_next_step_are_loaded_while_a_step_runs(tmp_path: Path) -> None:
    loaded = [threading.Event() for _ in range(STEPS)]

    class Recording(Addressed):
        def at(self, step: int) -> Batch:
            loaded[step].set()
            return super().at(step)

    job = TrainingJob(RunFolder.create(tmp_path / "run", Config()), retain=Recording())
    overlapped = []
    job.method.after_step = lambda step: overlapped.append(step == STEPS or loaded[step].wait(SECONDS_TO_WAIT))
    job.go()
    assert overlapped == [True] * STEPS
    assert not background_threads()


@pytest.mark.parametrize("error", [UserError("The cache file is damaged."), Killed()])
def test_an_error_of_batches_ends_the_run_with_its_own_type(tmp_path: Path, error: BaseException) -> None:
    class Broken(Addressed):
        def at(self, step: int) -> Batch:
            if step == 5:
                raise error
            return super().at(step)

    job = TrainingJob(RunFolder.create(tmp_path / "run", Config()), retain=Broken())
    with pytest.raises(type(error)) as caught:
        job.go()
    assert caught.value is error
    assert job.method.iteration == 5
    assert not background_threads()
    assert [path.name for path in job.run.path.glob("*checkpoint-*")] == ["checkpoint-4"]


def test_steps_go_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: TrainingJob
) -> None:
    job = TrainingJob(RunFolder.create(tmp_path / "run", Config()))
    stepped = [threading.Event() for _ in range(STEPS + 1)]
    job.method.after_step = lambda step: stepped[step].set()
    overlapped = []

    def slow(folder: Path, path: Path) -> None:
        # The checkpoint of step 4 is on its way while steps 5, 6 and 7 are taken; the next checkpoint waits for it.
        if path.name == "checkpoint-4":
            overlapped.append(stepped[7].wait(SECONDS_TO_WAIT))
            assert not stepped[9].is_set()
        publish(folder, path)

    monkeypatch.setattr("erasediff.io.atomic.publish", slow)
    job.go()
    assert overlapped == [True]
    assert not background_threads()
    assert_same(job, uninterrupted)
    for step in (12, STEPS):
        ours, theirs = (each.run.path / f"checkpoint-{step}" for each in (job, uninterrupted))
        assert (ours / "state.safetensors").read_bytes() == (theirs / "state.safetensors").read_bytes()
        assert (ours / "manifest.json").read_bytes() == (theirs / "manifest.json").read_bytes()


@pytest.mark.parametrize("last_step", [6, STEPS])
def test_a_checkpoint_that_cannot_be_written_is_the_error_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_step: int
) -> None:
    """Failures within the loop, or while its end waits for the write."""
    job = TrainingJob(RunFolder.create(tmp_path / "run", Config()))
    stepped = [threading.Event() for _ in range(STEPS + 1)]
    job.method.after_step = lambda step: stepped[step].set()

    def full(folder: Path, path: Path) -> None:
        if path.name == ("checkpoint-4" if last_step == 6 else "checkpoint-13"):
            assert stepped[last_step].wait(SECONDS_TO_WAIT)
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(folder, path)

    monkeypatch.setattr("erasediff.io.atomic.publish", full)
    with pytest.raises(UserError, match=r"The disk is full: .*checkpoint-(4|13) was not written.*--resume latest"):
        job.go()
    left = sorted(path.name for path in job.run.path.glob("*checkpoint-*"))
    assert left == ([] if last_step == 6 else ["checkpoint-12", "checkpoint-8"])


def test_an_error_of_a_step_waits_for_the_checkpoint_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: TrainingJob
) -> None:
    killed = TrainingJob(RunFolder.create(tmp_path / "killed", Config()))
    dying = threading.Event()

    def kill(iteration: int) -> None:
        if iteration == 5:
            dying.set()
            raise Killed

    def slow(folder: Path, path: Path) -> None:
        assert dying.wait(SECONDS_TO_WAIT)
        publish(folder, path)

    killed.method.after_step = kill
    with monkeypatch.context() as patch:
        patch.setattr("erasediff.io.atomic.publish", slow)
        with pytest.raises(Killed):
            killed.go()
    assert [path.name for path in killed.run.path.glob("*checkpoint-*")] == ["checkpoint-4"]
    resumed = TrainingJob(RunFolder.resume(killed.run.path, Config()))
    resumed.go()
    assert_same(resumed, uninterrupted)


@pytest.mark.parametrize("kill_after", sorted(random.Random(0).sample(range(1, STEPS + 1), 5)))
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, uninterrupted: TrainingJob, kill_after: int) -> None:
    killed = TrainingJob(RunFolder.create(tmp_path / "killed", Config()))

    def kill(iteration: int) -> None:
        if iteration == kill_after:
            raise Killed

    killed.method.after_step = kill
    with pytest.raises(Killed):
        killed.go()
    torch.manual_seed(random.randrange(1000))
    resumed = TrainingJob(RunFolder.resume(tmp_path / "killed", Config()))
    resumed.go()
    assert_same(resumed, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_the_step_and_leaves_a_checkpoint(
    tmp_path: Path, uninterrupted: TrainingJob, number: signal.Signals
) -> None:
    stopped = TrainingJob(RunFolder.create(tmp_path / "stopped", Config()))
    stopped.method.after_step = lambda step: os.kill(os.getpid(), number) if step == 6 else None
    # Whoever runs the tests under nohup has made SIGHUP one that is ignored.
    outer = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(Interrupted) as caught:
            stopped.go()
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, outer)
    assert (caught.value.step, caught.value.exit_code) == (6, 128 + number)
    assert caught.value.checkpoint == tmp_path / "stopped" / "checkpoint-6"
    assert "Press Ctrl-C again" in stopped.output.getvalue()
    resumed = TrainingJob(RunFolder.resume(tmp_path / "stopped", Config()))
    resumed.go()
    assert_same(resumed, uninterrupted)


def test_a_run_under_nohup_outlives_its_terminal(tmp_path: Path, uninterrupted: TrainingJob) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        left = TrainingJob(RunFolder.create(tmp_path / "left", Config()))
        left.method.after_step = lambda step: os.kill(os.getpid(), signal.SIGHUP) if step == 6 else None
        left.go()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert_same(left, uninterrupted)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    stopped = TrainingJob(RunFolder.create(tmp_path / "stopped", Config()))

    def press_twice(iteration: int) -> None:
        if iteration == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    stopped.method.after_step = press_twice
    with pytest.raises(KeyboardInterrupt):
        stopped.go()
    assert sorted(path.name for path in stopped.run.path.glob("checkpoint-*")) == ["checkpoint-4"]


def test_resuming_a_finished_run_changes_nothing(uninterrupted: TrainingJob) -> None:
    again = TrainingJob(RunFolder.resume(uninterrupted.run.path, Config()))
    assert again.go().steps == 0
    assert_same(again, uninterrupted)


def test_there_is_one_record_per_step(uninterrupted: TrainingJob) -> None:
    records = list(uninterrupted.run.metrics.read())
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert records[0]["finite"] is True
    assert type(records[0]["skipped"]) is int


def test_the_device_is_read_only_when_something_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way from a tensor to a Python number is counted; checkpoints need one read each, logging another."""
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        original = getattr(Tensor, name)

        def counted(tensor: Tensor, *args: Any, _original: Any = original, _name: str = name) -> Any:
            reads.append(_name)
            return _original(tensor, *args)

        monkeypatch.setattr(Tensor, name, counted)
    job = TrainingJob(
        RunFolder.create(tmp_path / "run", Config()), RunConfig(checkpoint_every=100, log_every=5, keep_checkpoints=1)
    )
    job.method.optimizer = torch.optim.SGD(job.method.model.parameters(), lr=0.1)  # type: ignore[assignment]
    job.go()
    assert reads == ["tolist"] * 3


def test_running_out_of_memory_is_one_sentence(tmp_path: Path) -> None:
    job = TrainingJob(RunFolder.create(tmp_path / "run", Config()))

    def run_out(iteration: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    job.method.after_step = run_out
    with pytest.raises(UserError, match="accumulation_steps"):
        job.go()


def test_learning_rates() -> None:
    rate = LearningRate(1.0, steps=12, warmup_steps=2, shape="cosine")
    assert [rate.at(step) for step in (0, 1, 2, 7)] == pytest.approx([0.5, 1.0, 1.0, 0.5])
    assert rate.at(12) == pytest.approx(0.0)
    assert LearningRate(1.0, steps=12).at(11) == 1.0

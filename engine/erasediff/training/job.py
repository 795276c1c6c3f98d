"""Training jobs, built but not begun: a model, a method, its batches, and the device they are on."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from erasediff.config import Config, TrainConfig, UnlearnConfig
from erasediff.data.image_lists import ImageLists
from erasediff.errors import RunFailedError, UserError
from erasediff.io.atomic import atomic_write, storage_errors
from erasediff.io.tensor_file import LazyWeights
from erasediff.methods import METHOD_SPECS, Solver
from erasediff.models.trainable import frozen_copy
from erasediff.models.weight_update import WeightUpdate
from erasediff.parallel.control_plane import ControlPlane
from erasediff.parallel.full_weights import ema_weights, gather_ema_weights, load_full_weights_
from erasediff.parallel.init import check_launch, join, local_device
from erasediff.parallel.wrap import parallelize_frozen, parallelize_network
from erasediff.parallel.zero.config import cuts_parameters
from erasediff.training.collapse_guard import MOST_BATCHES, SAMPLES, Collapse, CollapseGuard, RetainedLoss
from erasediff.training.loop import Batches, check_skipped_steps, prefetched, run_steps
from erasediff.training.lr_schedule import LearningRate
from erasediff.training.rounds import Rounds, rate_of_round
from erasediff.training.run_dir import CONFIG, MODEL, ROLLED_BACK, RunPlace
from erasediff.training.run_lock import run_lock
from erasediff.training.run_size import check_storage
from erasediff_kernels import ConstrainedAdamW, backend_for


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """Result of a finished run.

    Attributes:
        run: Folder of the run.
        model: Path of the saved model.
        steps_taken: Steps taken by this process.
        seconds: Wall time of these steps.
        metrics: Metrics of the last step.
        weights_changed: Share of the network's weights that differ from those before the first step, averaged ones
            where these are saved; None on a rank that does not write.
        relative_update: |w - w_0| / |w_0| over the tensors that changed; None likewise.
    """

    run: Path
    model: Path
    steps_taken: int
    seconds: float
    metrics: dict[str, Any]
    weights_changed: float | None = None
    relative_update: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """Training job: a method, the network that it trains, its batches and its schedule.

    Attributes:
        title: Title of the progress bar.
        config: Complete configuration.
        network: The model's own network; among several ranks the method trains it within a parallel wrapper.
        save: Writes the model to a path, and returns how its weights differ from those before the first step.
        optimizer: Optimizer of the method.
        method: Takes the steps.
        rate: Learning-rate schedule.
        retain: Batches of retained data.
        forget: Batches of forgotten data, if the method takes them.
        saved_as: Name of the model in the run's folder.
        disk_bytes: Estimate of the bytes that the model and all checkpoints take at most.
        lists: Images to forget and to retain, which the run's folder records before the first step.
        rounds: What decides whether the run goes on after the steps of ``rate``; None ends it there.
    """

    title: str
    config: Config
    network: nn.Module
    save: Callable[[Path], WeightUpdate | None]
    optimizer: ConstrainedAdamW
    method: Solver
    rate: LearningRate
    retain: Batches
    forget: Batches | None = None
    saved_as: str = MODEL
    disk_bytes: int = 0
    lists: ImageLists | None = None
    rounds: Callable[[Console], Rounds] | None = None

    def run(self, place: RunPlace, console: Console) -> RunResult:
        """Take all steps, from the beginning or from where ``place`` resumes, and save the averaged weights.

        torch's number of threads and random state are restored afterwards.

        Raises:
            RunFailedError: More than one in ten steps was skipped, or no weight changed; no model is written. Or what
                should be kept was being destroyed: see ``CollapseGuard``.
            UserError: Another process is writing to the run, the disk has no room for it, and as ``run_steps``.
        """
        device = next(self.network.parameters()).device
        with self.thread_scope(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.config.seed)
            with _locked(place, console):
                return self._run(place, console)

    def thread_scope(self) -> AbstractContextManager[None]:
        """Scope of the configuration's CPU threads; see the function ``thread_scope``."""
        return thread_scope(self.config.threads)

    def _run(self, place: RunPlace, console: Console) -> RunResult:
        self.check_storage(place.path)
        run = place.open(self.config)
        self._record_images(run.path, console)
        guard = self._guard(console)
        outcome = run_steps(
            self.method,
            self.network,
            run,
            steps=self.rate.steps,
            settings=self.config.run,
            retain=self.retain,
            forget=self.forget,
            before_step=self._apply_rate,
            console=console,
            title=self.title,
            shared=self.config.distributed.launch != "none",
            guard=guard,
            rounds=None if self.rounds is None else self.rounds(console),
        )
        check_skipped_steps(self.method, self.method.updates, run.path)
        if guard is not None and outcome.collapse is not None:
            guard.roll_back()
            raise self._collapsed(outcome.collapse, run.path)
        update = self._export(run.path / self.saved_as)
        if update is not None and update.note is not None:
            console.print(update.note, soft_wrap=True)
        return RunResult(
            run=run.path,
            model=run.path / self.saved_as,
            steps_taken=outcome.steps,
            seconds=outcome.seconds,
            metrics=outcome.last,
            weights_changed=None if update is None else update.changed / update.weights,
            relative_update=None if update is None else update.relative,
        )

    def _apply_rate(self, step: int) -> None:
        rate, within = rate_of_round(self.rate, step) if self.rounds is not None else (self.rate, step)
        rate.apply(self.optimizer, within)

    def check_storage(self, out: Path) -> None:
        """UserError if the folder ``out`` cannot be written, or its disk has no room for the run."""
        check_storage(out, self.disk_bytes)

    def _record_images(self, run: Path, console: Console) -> None:
        """List the images in the run's folder, by the main rank. UserError for a run that was started with others."""
        peers = ControlPlane.current()
        with peers.main_process_first():
            if peers.is_main and self.lists is not None:
                self.lists.record(run)
                console.print(self.lists.summary(), highlight=False, markup=False, soft_wrap=True)
                if self.lists.warning is not None:
                    console.print(self.lists.warning, highlight=False, markup=False, soft_wrap=True, style="yellow")

    def _guard(self, console: Console) -> CollapseGuard | None:
        """Guard of the run; None if it was turned off, or the method has nothing to keep."""
        settings, name = self.config.run, self.method.name
        if not settings.look_every:
            return None
        if not METHOD_SPECS[name].needs(self.config).retain:
            console.print(
                f"The method {name} trains on no retained images, so nothing stops a run that loses them.",
                highlight=False,
                soft_wrap=True,
            )
            return None
        first = self.retain.at(0)
        size = first["sample"].shape[0] * self.method.gradients.world.size
        count = min(-(-SAMPLES // size), MOST_BATCHES)
        batches = [first, *map(self.retain.at, range(1, count))]
        return CollapseGuard(RetainedLoss(self.method, batches), settings, self.rate.steps)

    def _collapsed(self, collapse: Collapse, run: Path) -> RunFailedError:
        """Save the weights of the best look, if there are any, and say what happened and what to lower."""
        path = run / ROLLED_BACK / self.saved_as
        if collapse.best is not None:
            with storage_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            self._export(path)
            saved = f"the weights of step {collapse.best} (loss {collapse.best_loss:.3g}) are in {path}"
        else:
            saved = "it was so at the first look, so no weights were saved"
        reads_eta = "eta" in METHOD_SPECS[self.method.name].reads(self.config)
        eta = self.config.unlearn.eta if reads_eta else None
        return RunFailedError(
            f"The retained data is no longer denoised after step {collapse.step}, with a loss of {collapse.after:.3g} "
            f"instead of {collapse.before:.3g} before the first step: lower the learning rate (now "
            f"{self.rate.peak:g}){'' if eta is None else f', eta (now {eta:g})'} or the number of steps; {saved}."
        )

    def _export(self, path: Path) -> WeightUpdate | None:
        """Write the averaged weights; where ranks share the work, the main one writes and the others wait for it."""
        if self.config.distributed.launch == "none":
            with ema_weights(self.optimizer):
                return self.save(path)
        weights = gather_ema_weights(self.method.model, self.method.gradients, path.parent)
        peers = ControlPlane.current()
        with peers.main_process_first():
            if peers.is_main:
                load_full_weights_(self.network, weights)
                return self.save(path)
        return None

    def trial_steps(self, count: int) -> Iterator[int]:
        """Take the first ``count`` steps, yielding after each, without writing files."""
        with self.thread_scope(), prefetched(self.retain, self.forget, stop=count) as batches:
            for index in range(count):
                self.rate.apply(self.optimizer, index)
                self.method.step(*batches.at(index))
                yield index


@dataclass(frozen=True, slots=True, kw_only=True)
class StandaloneJob:
    """Job of a method without optimizer steps: ``procedure`` writes to a folder and returns a report."""

    config: Config
    procedure: Callable[[Path, Console], dict[str, Any]]

    def run(self, place: RunPlace, console: Console) -> dict[str, Any]:
        """Run the method in the folder of ``place``, and leave the configuration there."""
        with thread_scope(self.config.threads), _locked(place, console):
            report = self.procedure(place.path, console)
            atomic_write(place.path / CONFIG, self.config.to_yaml())
        return report


def _locked(place: RunPlace, console: Console) -> AbstractContextManager[None]:
    """The lock of the run's folder, on the main rank alone."""
    return run_lock(place.path, console) if ControlPlane.current().is_main else nullcontext()


def check_single_process(config: Config) -> None:
    """Raise UserError for several processes and a method that runs in one only."""
    method, launch = config.unlearn.method, config.distributed.launch
    reason = METHOD_SPECS[method].single_process_reason
    if launch != "none" and reason is not None:
        raise UserError(f"The method {method} runs in one process, since {reason}: use --launch none.")


@contextmanager
def thread_scope(threads: int | None = None) -> Iterator[None]:
    """Restore torch's number of CPU threads after the block; within it, use ``threads`` (None: leave them alone).

    ``set_up_device`` sets the threads of a configuration for the whole process, so every function of the library that
    calls it runs in such a scope.
    """
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)


def set_up_device(config: Config) -> torch.device:
    """Set up the device of ``config``: CPU threads, process group, operators. See ``thread_scope``.

    Raises:
        UserError: For a device that this machine or the operators do not have, and for operators forced to a backend
            that cannot serve it.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    check_launch(config.distributed)
    name = local_device(config.device, config.distributed.launch)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError, NotImplementedError):
        raise UserError(f'There is no device "{name}" on this machine; try --device auto.') from None
    try:
        backend_for(device)
    except (ValueError, RuntimeError) as error:
        raise UserError(f'The device "{name}" cannot be used: {error}.') from None
    join(config.distributed, device)
    return device


def parallelize(
    config: Config,
    settings: TrainConfig | UnlearnConfig,
    network: nn.Module,
    parameters: Iterable[nn.Parameter],
    make_optimizer: Callable[[Iterable[nn.Parameter]], ConstrainedAdamW],
    weights: LazyWeights | None = None,
) -> tuple[nn.Module, ConstrainedAdamW]:
    """``parallelize_network`` with the sizes of ``settings``. UserError for a method that runs in one process only."""
    if config.distributed.launch != "none" and isinstance(settings, UnlearnConfig):
        check_single_process(config)
        if settings.moments == "8-bit":
            raise UserError("8-bit moments are those of one process, since shards do not end where blocks do.")
    return parallelize_network(
        network,
        parameters,
        make_optimizer,
        config.distributed,
        batch_size=settings.batch_size,
        accumulation_steps=settings.accumulation_steps,
        max_grad_norm=settings.max_grad_norm,
        weights=weights,
        autocast=precision_of(config),
    )


def loads_sharded(config: Config) -> bool:
    """Return true if weights are sharded as they are read: under ZeRO-3, unless a LoRA is merged into them first."""
    return cuts_parameters(config.distributed) and config.text_to_image.lora is None


def teacher_of(config: Config, network: nn.Module, weights: LazyWeights | None = None) -> Callable[[], nn.Module]:
    """Function that returns the frozen original of ``network``, copied at the first call.

    If ranks share the network, it is copied now when the method needs a teacher, before it is wrapped or sharded; if
    they shard it, the copy is sharded as well. ``weights`` are those of a network whose parameters are still empty.
    """
    distributed = config.distributed
    cut = distributed.launch == "fsdp" or cuts_parameters(distributed)

    @functools.cache
    def teacher() -> nn.Module:
        copy = frozen_copy(network, share_frozen=not cut)
        return parallelize_frozen(copy, distributed, weights, precision_of(config))

    if distributed.launch != "none" and METHOD_SPECS[config.unlearn.method].needs(config).teacher:
        teacher()
    return teacher


def precision_of(config: Config) -> torch.dtype | None:
    """Dtype of autocast: bfloat16 for mixed precision, otherwise None."""
    return torch.bfloat16 if config.precision == "bf16-mixed" else None

"""What a run needs, built but not begun: a model, a method and its batches."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from erasediff.config import Config, TrainConfig, UnlearnConfig
from erasediff.errors import UserError
from erasediff.io.tensor_file import LazyWeights
from erasediff.methods import METHOD_SPECS, Method
from erasediff.models.trainable import frozen_copy
from erasediff.parallel.control_plane import ControlPlane
from erasediff.parallel.full_weights import ema_weights, gather_ema_weights, load_full_weights_
from erasediff.parallel.init import check_launch, join, local_device
from erasediff.parallel.wrap import parallelize_frozen, parallelize_network
from erasediff.parallel.zero.config import cuts_parameters
from erasediff.training.loop import Batches, run_steps
from erasediff.training.lr_schedule import LearningRate
from erasediff.training.run_dir import MODEL, RunPlace
from erasediff_kernels import ConstrainedAdamW
from erasediff_kernels._dispatch import selected as selected_backend

SINGLE_PROCESS_ONLY = {"pruning": "the masks that it leaves, and its report of neurons, are made of whole weights"}
"""The methods that one process alone can run, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """A finished run: ``model`` is what was saved, ``metrics`` those of the last step."""

    run: Path
    model: Path
    steps_taken: int
    seconds: float
    metrics: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """One method, about to train one network on one stream of batches, or two.

    ``network`` is the model's own; where ranks share the work, the method trains it inside of something else. ``save``
    writes the network, with all that belongs to it, to a path; in the run's folder, that is ``saved_as``.
    """

    title: str
    config: Config
    network: nn.Module
    save: Callable[[Path], None]
    optimizer: ConstrainedAdamW
    method: Method
    rate: LearningRate
    retain: Batches
    forget: Batches | None = None
    saved_as: str = MODEL

    def run(self, place: RunPlace, console: Console) -> RunResult:
        """Take all steps, from the beginning or from where ``place`` resumes, and save the averaged weights."""
        torch.manual_seed(self.config.seed)
        run = place.open(self.config)
        outcome = run_steps(
            self.method,
            self.network,
            run,
            steps=self.rate.steps,
            settings=self.config.run,
            retain=self.retain,
            forget=self.forget,
            before_step=lambda step: self.rate.apply(self.optimizer, step),
            console=console,
            title=self.title,
            shared=self.config.distributed.launch != "none",
        )
        self._export(run.path / self.saved_as)
        return RunResult(
            run=run.path,
            model=run.path / self.saved_as,
            steps_taken=outcome.steps,
            seconds=outcome.seconds,
            metrics=outcome.last,
        )

    def _export(self, path: Path) -> None:
        """Write the averaged weights; where ranks share the work, the main one writes and the others wait for it."""
        if self.config.distributed.launch == "none":
            with ema_weights(self.optimizer):
                self.save(path)
            return
        method: Any = self.method
        weights = gather_ema_weights(method.model, method.gradients, path.parent)
        peers = ControlPlane.current()
        with peers.main_process_first():
            if peers.is_main:
                load_full_weights_(self.network, weights)
                self.save(path)

    def trial_step(self, index: int) -> None:
        """Take one step that no run folder hears of."""
        self.rate.apply(self.optimizer, index)
        self.method.step(self.retain.at(index), self.forget.at(index) if self.forget is not None else {})


def set_up_device(config: Config) -> torch.device:
    """The device that ``config`` means, set up for use.

    UserError for one that this machine does not have, and for operators forced to a backend that cannot serve it.
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
    except (RuntimeError, AssertionError):
        raise UserError(f'There is no device "{name}" on this machine; try --device auto.') from None
    try:
        selected_backend(device.type)
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from None
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
        why = SINGLE_PROCESS_ONLY.get(settings.method)
        if why is not None:
            raise UserError(f"The method {settings.method} runs in one process, since {why}: use --launch none.")
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
    """Whether no rank is to hold the whole network: under ZeRO-3, unless a LoRA is merged into it first."""
    return cuts_parameters(config.distributed) and config.text_to_image.lora is None


def teacher_of(config: Config, network: nn.Module, weights: LazyWeights | None = None) -> Callable[[], nn.Module]:
    """The frozen original of ``network``, one for all who ask, copied when the first does.

    Where ranks are going to share the network, it is copied now if the method will ask: later it is no longer whole.
    Where they cut it into shards, the copy is cut as well; ``weights`` are those of a network that has none yet.
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
    """What ``autocast`` should be: None in float32."""
    return torch.bfloat16 if config.precision == "bfloat16" else None

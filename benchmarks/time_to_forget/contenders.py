"""Who unlearns, from which images: each contender holds a model of its own and takes one kept update at a time."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from published import Published, PublishedLoop
from rich.console import Console
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from erasediff.data import Buckets, CachedBatches, CachedImages, LatentCache, Stream, forget_classes, read_images
from erasediff.diffusion import Relabel
from erasediff.io.cache_dir import cache_folder
from erasediff.methods import EraseDiff, Norm
from erasediff.models.base import LatentModel
from erasediff.models.load import load_text_to_image
from erasediff.parallel.full_weights import ema_weights
from erasediff_kernels import ConstrainedAdamW


@dataclass(kw_only=True)
class Contender:
    """``seconds`` and ``cpu_seconds`` count ``step`` alone, whatever is done between steps.

    result: within its block, ``model`` holds the weights that the contender would save
    """

    name: str
    model: LatentModel
    step: Callable[[], None]
    result: Callable[[], AbstractContextManager[None]] = nullcontext
    steps: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    settings: dict[str, float | int | str | None] = field(default_factory=dict)

    def advance(self, steps: int) -> None:
        """Takes ``steps`` updates that stay in the weights, with all that the method does before them."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.step()
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu
        self.steps += steps


@dataclass(frozen=True, slots=True)
class Task:
    """The checkpoint, what is forgotten and retained of the images, and the prompt that takes the forgotten's place."""

    checkpoint: Path
    retain: CachedImages
    forget: CachedImages
    anchor: str
    batch_size: int
    seed: int

    @classmethod
    def of_class(
        cls, checkpoint: Path, data: Path, forgotten: str, anchor: str, batch_size: int, seed: int, console: Console
    ) -> Task:
        model = load_text_to_image(checkpoint)
        fill = partial(
            LatentCache(cache_folder()).fill,
            model=model,
            buckets=Buckets.only(*model.default_size),
            console=console,
            batch_size=100,
        )
        chosen = forget_classes(read_images(str(data)), [forgotten])
        return cls(checkpoint, fill(chosen.retain), fill(chosen.forget), anchor, batch_size, seed)

    def batches(self) -> tuple[CachedBatches, CachedBatches]:
        """(retain, forget), the same for every contender."""
        batches = partial(CachedBatches, batch_size=self.batch_size, seed=self.seed)
        return (
            batches(self.retain, stream=Stream.RETAIN, caption_dropout=0.1),
            batches(self.forget, stream=Stream.FORGET),
        )


def erasediff(task: Task, lr: float, eta: float, ema_decay: float | None) -> Contender:
    """The engine's step as ``erasediff unlearn`` takes it: barrier norm, relabelling and retention by the original."""
    model = load_text_to_image(task.checkpoint)
    network = model.denoiser
    teacher = copy.deepcopy(network).requires_grad_(False).eval()
    optimizer = ConstrainedAdamW(network.parameters(), lr, ema_decay=ema_decay)
    method = EraseDiff(
        network,
        optimizer,
        process=model.process,
        denoiser=model.predict,
        barrier=Norm(eta),
        target=Relabel(model.encode_prompts([task.anchor]), teacher),
        retain_teacher=teacher,
        seed=task.seed,
    )
    retain, forget = task.batches()

    def step() -> None:
        # The report stays unread, as between two log lines of a run.
        method.step(retain.at(method.iteration), forget.at(method.iteration))

    return Contender(
        name="erasediff",
        model=model,
        step=step,
        result=partial(ema_weights, optimizer),
        settings={"lr": lr, "eta": eta, "ema_decay": ema_decay, "batch_size": task.batch_size},
    )


def published(task: Task, settings: Published, ema_decay: float | None) -> Contender:
    """The public loop, repaired, over the same batches; averaged weights are none of the scripts'."""
    model = load_text_to_image(task.checkpoint)
    network = model.denoiser
    retain, forget = task.batches()
    pass_length = -(-len(task.forget) // task.batch_size)
    loop = PublishedLoop(
        network,
        process=model.process,
        denoiser=model.predict,
        anchor=model.encode_prompts([task.anchor]),
        retain=retain,
        forget=forget,
        pass_length=pass_length,
        settings=settings,
        seed=task.seed,
    )
    if ema_decay is None:
        step, result = loop.step, nullcontext
    else:
        averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))

        def step() -> None:
            loop.step()
            averaged.update_parameters(network)

        result = partial(_with_weights_of, network, averaged.module)
    return Contender(
        name="published",
        model=model,
        step=step,
        result=result,
        settings={
            "lr": settings.lr,
            "ema_decay": ema_decay,
            "multiplier": settings.multiplier,
            "inner_passes": settings.inner_passes,
            "pass_length": pass_length,
            "batch_size": task.batch_size,
        },
    )


@contextmanager
def _with_weights_of(network: nn.Module, other: nn.Module) -> Iterator[None]:
    own = copy.deepcopy(network.state_dict())
    network.load_state_dict(other.state_dict())
    try:
        yield
    finally:
        network.load_state_dict(own)

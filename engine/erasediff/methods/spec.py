"""What a training loop needs of a method, and what a method asks for to be made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from erasediff.config import Config
from erasediff.diffusion.batch import Batch, Denoiser
from erasediff.diffusion.noise_schedule import Process
from erasediff.diffusion.targets import Relabel
from erasediff.methods.base import SolverOptions, StepReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What a method looks at, so that a run asks for no more.

    retain, forget: batches of that kind; of a method that needs neither, both are empty
    teacher:        a frozen copy of the network; where ranks share the network, it is made before they do
    relabel:        something to put in the place of what is forgotten
    """

    retain: bool = True
    forget: bool = True
    teacher: bool = False
    relabel: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildContext:
    """All that a method may be made of. What costs something is a function: it is called by those who need it.

    options:        what every method takes: how the model is called, precision, seed, ...
    relabel:        the target that puts another condition in the place of the forgotten one
    teacher:        a frozen copy of the network as it is now
    encode_prompts: condition tensors [N, ...] of prompts, sizes included; UserError for a model without prompts
    latent_shape:   (C, h, w) of a sample, likewise
    prompts:        what is to be forgotten, by name
    batch_size:     of this process's part
    forget_batches, retain_batches: the first batches, as many as are asked for
    """

    config: Config
    network: nn.Module
    optimizer: Any
    process: Process
    denoiser: Denoiser
    options: SolverOptions
    relabel: Callable[[], Relabel]
    teacher: Callable[[], nn.Module]
    encode_prompts: Callable[[Sequence[str]], dict[str, Tensor]]
    latent_shape: Callable[[], tuple[int, ...]]
    prompts: Sequence[str]
    batch_size: int
    forget_batches: Callable[[int], Iterable[Batch]]
    retain_batches: Callable[[int], Iterable[Batch]]


class Method(Protocol):
    """One step at a time, on the device, resumable."""

    @property
    def name(self) -> str: ...

    @property
    def iteration(self) -> int:
        """Steps taken so far."""
        ...

    def step(self, retain: Batch, forget: Batch) -> StepReport: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSpec:
    """How a method is made: one in the method's own file, listed in ``METHOD_SPECS``, is all that a new method takes.

    make:    the method that ``materials.config`` describes, about to train ``materials.network``
    needs:   which batches it looks at, as the configuration asks
    trained: the parameters that it trains in the place of those called by the names given; None for those themselves
    finish:  what is done to the network, and written beside the model at the path given, before the model is saved
    """

    name: str
    make: Callable[[BuildContext], Method]
    needs: Callable[[Config], Requirements] = lambda _: Requirements()
    trained: Callable[[Config, nn.Module, Sequence[str]], list[nn.Parameter]] | None = None
    finish: Callable[[Method, Path], None] | None = None

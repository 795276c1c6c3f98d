"""Method registry entries: what a method reads, what it requires, and how it is built."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from erasediff.config import Config
from erasediff.config.fields import Section
from erasediff.config.method_index import section_name
from erasediff.diffusion.batch import Batch, Denoiser
from erasediff.diffusion.noise_schedule import Process
from erasediff.diffusion.targets import Relabel
from erasediff.methods.base import Solver, SolverOptions
from erasediff.models.base import LatentModel
from erasediff.models.diffusion_model import Space


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """Inputs of a method, so that a run prepares no more.

    Attributes:
        retain: batches of retained data; of a method that needs no batches at all, both kinds are empty.
        forget: batches of forgotten data.
        teacher: a frozen copy of the network; where ranks share the network, it is copied before they do.
        relabel: an anchor, whose condition replaces that of what is forgotten.
        batches: batches of either kind that are looked at outside of the steps, from the first on.
    """

    retain: bool = True
    forget: bool = True
    teacher: bool = False
    relabel: bool = False
    batches: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildContext:
    """Ingredients of a solver. What costs something is a function, called by the methods that need it.

    Attributes:
        config: all settings, with the defaults of the kind of model filled in.
        network: the network to train, as ranks share it.
        optimizer: of its trained parameters.
        process: noise schedule and prediction type.
        denoiser: how the network is called.
        options: keywords that every solver takes: denoiser, precision, seed, ...
        relabel: the target that asks for the anchor's condition; UserError for a model without conditions.
        teacher: a frozen copy of the network as it is now.
        encode_prompts: condition tensors [N, ...] of prompts, sizes included; UserError for a model without prompts.
        latent_shape: (C, h, w) of a sample; UserError likewise.
        prompts: what is to be forgotten, by name.
        batch_size: samples of each kind in this process's part of a batch.
        forget_batches, retain_batches: the first batches, as many as are asked for.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """Ingredients of a method without optimizer steps.

    Attributes:
        config: all settings, with the defaults of text-to-image models filled in.
        load_model: reads the checkpoint ``config.unlearn.model``, onto the device.
        out: the folder of the run; nothing is there yet.
        console: for progress bars.
    """

    config: Config
    load_model: Callable[[], LatentModel]
    out: Path
    console: Console


SOLVER_KEYS = frozenset(
    {
        *("model", "forget", "retain", "method"),
        *("steps", "batch_size", "accumulation_steps", "lr", "lr_schedule", "warmup_steps"),
        *("weight_decay", "ema_decay", "moments", "max_grad_norm", "min_snr_gamma"),
    }
)
"""Settings of ``unlearn`` that every method reads which takes optimizer steps."""
UNTIL_KEYS = frozenset({"until", "max_steps", "max_minutes"})
"""Those of a run that goes on until it has forgotten, of methods whose every step forgets."""
RETAIN_KEYS = frozenset({"antithetic", "retain_label_dropout"})
"""Those that concern the retained batches."""
FORGET_KEYS = frozenset({"antithetic", "forget_label_dropout"})
"""Those that concern the forgotten batches."""


def _no_defaults(_config: Config, _space: Space) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSpec:
    """One unlearning method, as ``erasediff.methods`` finds it at the top level of any of its files.

    The configuration, the command line's ``--method`` with its help, and ``erasediff info --methods`` come from it, so
    that a new method is one file. ``name`` and ``summary`` are literals: ``--help`` reads them without importing torch.
    A method has ``build``, or ``run`` if it takes no optimizer steps.

    Attributes:
        name: what ``--method`` calls it.
        summary: one line of help, without a full stop.
        config: its own settings; they are the section of the configuration that is called like the method, with
            underscores.
        reads: keys of the section ``unlearn`` that it reads; others are refused where a user has set them.
        sections: sections of other methods that it reads besides its own.
        defaults: defaults of ``unlearn.*`` that follow from the configuration, in pixel or in latent space.
        needs: which batches and which frozen copies it looks at.
        prompts: the lists of prompts that ``build`` has encoded. One that is missing here is encoded later, beside the
            network: it costs the memory of both.
        trained: the parameters that it trains instead of those with the given names; None for those themselves.
        build: the solver, about to train ``context.network``.
        finalize: what is done to the network, and written beside the model at the given path, before it is saved.
        run: the whole method, for one without optimizer steps: it writes to the given folder and returns a report.
        single_process_reason: why it runs in one process only, as a clause; None if it does not.
    """

    name: str
    summary: str
    config: type[Section] | None = None
    reads: Callable[[Config], Collection[str]] = lambda _: SOLVER_KEYS | RETAIN_KEYS | FORGET_KEYS
    sections: Collection[str] = ()
    defaults: Callable[[Config, Space], Mapping[str, Any]] = _no_defaults
    needs: Callable[[Config], Requirements] = lambda _: Requirements()
    prompts: Callable[[Config], Iterable[Sequence[str]]] = lambda _: ()
    trained: Callable[[Config, nn.Module, Sequence[str]], list[nn.Parameter]] | None = None
    build: Callable[[BuildContext], Solver] | None = None
    finalize: Callable[[Solver, Path], None] | None = None
    run: Callable[[RunContext], dict[str, Any]] | None = None
    single_process_reason: str | None = None

    def __post_init__(self) -> None:
        if (self.build is None) == (self.run is None):
            raise ValueError(f"the method {self.name} must have either build or run")

    @property
    def section(self) -> str:
        """The key of its settings in a configuration."""
        return section_name(self.name)

"""Step plan: the network passes of one training step, and the state that it keeps in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from erasediff.config import Config
from erasediff.errors import UserError

Precision = Literal["fp32", "bf16-mixed", "bf16-true"]
"""fp32: everything; bf16-mixed: float32 weights, bfloat16 operators (autocast); bf16-true: bfloat16 weights and
operators, with fp32 masters under ZeRO and stochastic rounding without. The words are Lightning's."""

PRECISION_ALIASES: dict[str, Precision] = {"float32": "fp32", "autocast": "bf16-mixed", "bfloat16": "bf16-true"}


def parse_precision(text: str) -> Precision:
    """Parse a precision, aliases included. UserError for any other word."""
    names: dict[str, Precision] = {"fp32": "fp32", "bf16-mixed": "bf16-mixed", "bf16-true": "bf16-true"}
    names |= PRECISION_ALIASES
    if text not in names:
        raise UserError(f'There is no precision "{text}"; choose fp32, bf16-mixed or bf16-true.')
    return names[text]


def run_precision(config: Config) -> Precision:
    """Precision of a run: bf16-true where the weights are stored in bfloat16."""
    if "bf16-true" in (config.precision, config.text_to_image.weights) or config.text_to_image.weights == "bfloat16":
        return "bf16-true"
    return "fp32" if config.precision in ("float32", "fp32") else "bf16-mixed"


def dtypes(precision: Precision) -> tuple[torch.dtype, torch.dtype | None]:
    """(dtype of the weights, dtype of autocast or None)."""
    weights = torch.bfloat16 if precision == "bf16-true" else torch.float32
    return weights, torch.bfloat16 if precision == "bf16-mixed" else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """Calls of one network within a step.

    Attributes:
        network: The model being trained, or its frozen copy.
        gradient: Forward and backward; otherwise forward alone, without gradients.
        data: Batch that the samples are of.
        rows: Samples in one call.
        count: Calls per step; a fraction where an inner solve is refreshed every few steps.
        nested: The activations of another pass are kept in memory meanwhile.
    """

    network: Literal["model", "teacher"] = "model"
    gradient: bool = True
    data: Literal["retain", "forget"] = "forget"
    rows: int = 1
    count: float = 1.0
    nested: bool = False

    @property
    def samples(self) -> float:
        """Samples per step."""
        return self.rows * self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Passes and state of one process in a step; the default is one retained and one forgotten sample.

    Attributes:
        method: Name of the unlearning method.
        train: Selection of weights, or "lora".
        precision: Precision of weights and operators.
        batch_size: Retained samples per process, and as many forgotten ones.
        accumulation_steps: Micro-batches per batch.
        passes: All calls of networks.
        teacher: A frozen copy of the network is in memory.
        gradients: Lists of gradients that are in memory at the update, one or two.
        moment_bytes: Bytes of both Adam moments, per trained element.
        state_bytes: Bytes of the method's own state per trained element (inner copy, Fisher information, masks).
        averages: A running average of the trained weights is kept.
        gradient_checkpointing: Each block's activations are computed again in the backward pass.
    """

    method: str = "erasediff"
    train: str = "full"
    precision: Precision = "fp32"
    batch_size: int = 1
    accumulation_steps: int = 1
    passes: tuple[Pass, ...] = (Pass(data="retain"), Pass(data="forget"))
    teacher: bool = False
    gradients: int = 2
    moment_bytes: int = 8
    state_bytes: int = 0
    averages: bool = False
    gradient_checkpointing: bool = False

    @property
    def micro_batch_size(self) -> int:
        """Samples in the largest pass with gradients, or in the largest pass where none has."""
        trained = [part.rows for part in self.passes if part.gradient]
        return max(trained or [part.rows for part in self.passes])

    def rows(self, *, nested: bool) -> int:
        """Samples in the largest pass without gradients, beside the activations of another pass or alone."""
        return max((part.rows for part in self.passes if not part.gradient and part.nested == nested), default=0)

    def samples(self, **wanted: Any) -> float:
        """Samples per step in the passes whose attributes are those ``wanted``."""
        return sum(
            part.samples for part in self.passes if all(getattr(part, name) == value for name, value in wanted.items())
        )

    @property
    def data_samples(self) -> float:
        """Distinct samples per step that have a gradient: an inner solve trains on the forgotten ones again."""
        return sum(min(self.batch_size, self.samples(gradient=True, data=data)) for data in ("retain", "forget"))

    def describe(self) -> str:
        """Describe the passes in words, with samples per step, as in "model: forward + backward of 8"."""
        kinds = (
            ("model: forward + backward of", {"network": "model", "gradient": True}),
            ("model: forward of", {"network": "model", "gradient": False}),
            ("teacher: forward of", {"network": "teacher"}),
        )
        counted = [(label, self.samples(**wanted)) for label, wanted in kinds]
        return ", ".join(f"{label} {samples:g} samples" for label, samples in counted if samples)


def merge_passes(passes: Iterable[Pass], steps: int) -> tuple[Pass, ...]:
    """Equal passes of ``steps`` steps as one each, with its mean number of calls per step."""
    counts: dict[Pass, float] = {}
    for part in passes:
        counts[part] = counts.get(part, 0.0) + part.count
    return tuple(replace(part, count=count / steps) for part, count in counts.items())

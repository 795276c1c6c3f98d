"""What an unlearning run knows of the condition of its model: prompts, or class labels, or none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from rich.console import Console

from erasediff.config import Config
from erasediff.data.image_lists import ImageLists
from erasediff.models.checkpoint_model import CheckpointModel
from erasediff.training.loop import Batches
from erasediff.verdict.quick import QuickQuestion
from erasediff.workflows.load_model import read_denoiser


class RunBatches(NamedTuple):
    """Batches of this rank, and lists of their images; None for the lists of a rehearsal."""

    retain: Batches
    forget: Batches
    lists: ImageLists | None


class UnlearningRun(ABC):
    """Model, settings and data of an unlearning run; ``build_unlearning_job`` makes a job of it.

    Attributes:
        config: Configuration with the defaults of the kind of model.
        model: The model, whose denoiser may still be empty.
        console: Console for progress bars and notes.
        is_measured: The model's weights before the first step are those of its checkpoint.
    """

    config: Config
    model: CheckpointModel
    console: Console
    is_measured: bool

    @abstractmethod
    def selected_weights(self) -> list[str]:
        """Names of the weights to train, or that a LoRA is to adapt. UserError for a selection of nothing."""

    @abstractmethod
    def set_up_denoiser(self) -> None:
        """Set up the denoiser for training, empty or not: attention backend, checkpointing."""

    @abstractmethod
    def batches(self, *, rehearse: bool) -> RunBatches:
        """Batches of the run's images, after what the cache lacks was encoded; of noise for a rehearsal.

        Raises:
            UserError: For the images' mistakes.
        """

    @abstractmethod
    def question(self, batches: RunBatches) -> QuickQuestion | None:
        """Question of the looks of a run that goes on until it has forgotten; the encoders are still in memory."""

    def with_anchors(self, question: QuickQuestion) -> QuickQuestion:
        """``question`` with anchors that were chosen after it; the encoders may have left memory."""
        return question

    @abstractmethod
    def conditioning(self, batches: RunBatches) -> dict[str, Any]:
        """Keywords of ``UnlearningModel`` that depend on the condition, once the denoiser is read."""

    def load_denoiser(self) -> None:
        """Read the weights of an empty denoiser, and set it up."""
        read_denoiser(self.config, self.model)
        self.set_up_denoiser()

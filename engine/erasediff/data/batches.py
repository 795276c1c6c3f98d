"""Batches addressed by step: any step of a run can be looked up without replaying those before it."""

from __future__ import annotations

import torch
from torch import Tensor

from erasediff.data.images import Images
from erasediff.data.stream import Stream
from erasediff.process import NoiseRole


class GlobalBatches:
    """The batches of one stream, a function of (seed, stream, step) alone.

    The images are laid end to end in epochs, each a fresh permutation; the batch of ``step`` is the ``batch_size``
    images from position ``step * batch_size`` on. A set smaller than a batch repeats within it. Each rank takes its
    slice of the same global batch, so a run sees the same images whatever its world size.

    images:        where they lie, the batches lie
    batch_size:    of the global batch; a multiple of ``world_size``
    conditional:   whether batches carry ``"class_labels"``
    label_dropout: probability that a label becomes ``null_label`` (classifier-free guidance, Ho & Salimans 2022)

    Raises ``ValueError`` for sizes that do not fit and for label dropout without a null label.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        seed: int,
        stream: Stream = Stream.RETAIN,
        rank: int = 0,
        world_size: int = 1,
        conditional: bool = True,
        label_dropout: float = 0.0,
        null_label: int | None = None,
    ) -> None:
        if len(images) == 0 or batch_size < 1:
            raise ValueError(f"batches need images and a positive size, got {len(images)} and {batch_size}")
        if not 0 <= rank < world_size or batch_size % world_size:
            raise ValueError(f"a batch of {batch_size} cannot be cut for rank {rank} of {world_size}")
        if not 0 <= label_dropout < 1 or (label_dropout > 0 and conditional and null_label is None):
            raise ValueError(f"label_dropout must be in [0, 1) and needs a null_label, got {label_dropout}")
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.stream = stream
        self.slots = range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.conditional = conditional
        self.label_dropout = label_dropout
        self.null_label = null_label
        self._permutations: dict[int, Tensor] = {}

    def at(self, step: int) -> dict[str, Tensor]:
        """This rank's part of the batch of ``step``; ``"sample_ids"`` are the slots in the global batch."""
        device = self.images.sample.device
        index = self._indices(step)
        slots = torch.arange(self.slots.start, self.slots.stop, device=device)
        batch = {"sample": self.images.sample[index], "sample_ids": slots}
        if self.conditional:
            batch["class_labels"] = self._dropped(self.images.class_labels[index], slots, step)
        return batch

    def _indices(self, step: int) -> Tensor:
        """int64 [B]: where this rank's images of ``step`` lie in the set."""
        size, first = len(self.images), step * self.batch_size + self.slots.start
        epochs = range(first // size, (first + len(self.slots) - 1) // size + 1)
        known = self._permutations
        self._permutations = {e: known[e] if e in known else self._permutation(e) for e in epochs}
        order = torch.cat([self._permutations[e] for e in epochs])
        return order[first - epochs.start * size :][: len(self.slots)]

    def _permutation(self, epoch: int) -> Tensor:
        """int64 [N]: the order of the images in ``epoch``."""
        device = self.images.sample.device
        ids = torch.arange(len(self.images), device=device)
        return self.stream.words(ids, seed=self.seed, step=epoch, role=NoiseRole.ORDER).argsort(stable=True)

    def _dropped(self, class_labels: Tensor, slots: Tensor, step: int) -> Tensor:
        if self.label_dropout == 0 or self.null_label is None:
            return class_labels
        words = self.stream.words(slots, seed=self.seed, step=step, role=NoiseRole.LABEL_DROPOUT)
        return torch.where(words < round(self.label_dropout * 2**32), self.null_label, class_labels)

"""Judge that is an image classifier of ``transformers`` in a local folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from erasediff.errors import UserError
from erasediff.verdict.judges.base import Candidate
from erasediff.verdict.judges.labels import Labels, indices
from erasediff.verdict.judges.pictures import batches, pictures
from erasediff.verdict.judges.registry import JudgeKind
from erasediff.verdict.judges.transformers_folder import TransformersFolder

BATCH_SIZE = 64


class ClassifierJudge:
    """The label that a classifier gives an image; ``UNKNOWN`` where it is that of no candidate.

    Args:
        folder: A network for image classification with its image processor, as ``save_pretrained`` writes them.
        device: Device of the network.

    Raises:
        UserError: The folder holds no such network, is damaged, or does not name its labels.
    """

    name = "classifier"
    tells_apart = True

    def __init__(self, folder: Path, device: torch.device) -> None:
        opened = TransformersFolder.open(folder)
        self.device = device
        self.processor = opened.image_processor()
        self.model: Any = opened.load(transformers.AutoModelForImageClassification, device)
        config: Any = self.model.config
        names = [str(config.id2label.get(number)) for number in range(config.num_labels)]
        if all(name == f"LABEL_{number}" for number, name in enumerate(names)):
            raise UserError(f"The classifier in {folder} does not name its labels: give its config.json an id2label.")
        self.labels = Labels(names, f"The classifier in {folder}")
        self._facts = {"folder": str(folder), "model_type": opened.model_type, "sha256": opened.digests()}

    @property
    def description(self) -> Mapping[str, Any]:
        return {**self._facts, "labels": len(self.labels.names)}

    @torch.no_grad()
    def answers(self, images: Tensor, sought: Sequence[Candidate], others: Sequence[Candidate]) -> Tensor:
        """See ``Judge.answers``."""
        by_output = self.labels.by_output(sought, others)
        outputs: list[int] = []
        for part in batches(images, BATCH_SIZE):
            pixels = self.processor(images=pictures(part), return_tensors="pt")["pixel_values"]
            outputs += self.model(pixel_values=pixels.to(self.device)).logits.argmax(1).tolist()
        return torch.tensor(indices(outputs, by_output), dtype=torch.int64)


def _build(argument: str, device: torch.device) -> ClassifierJudge:
    if not argument:
        raise UserError("The judge classifier needs a folder: give classifier:FOLDER.")
    return ClassifierJudge(Path(argument), device)


KIND = JudgeKind("classifier", "classifier:FOLDER", _build)

"""The original model as judge: a diffusion classifier, which needs nothing but the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from erasediff.diffusion.batch import Batch
from erasediff.diffusion.noise_schedule import Process
from erasediff.evaluation.diffusion_classifier import DiffusionClassifier
from erasediff.models.checkpoint_model import CheckpointModel
from erasediff.verdict.judges.base import Candidate


class AnyDenoising(Protocol):
    """The members of a model of any family that a judge made of it calls."""

    @property
    def device(self) -> torch.device: ...

    @property
    def process(self) -> Process: ...

    def predict(self, model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor: ...


class OriginalJudge:
    """Judge of images by the model from before unlearning, which is to be frozen.

    Args:
        model: The original, with its autoencoder.
        classifier: Classifier made of its denoiser.
        progress: Called with a number of the classifier's ``passes``.
    """

    name = "original"
    tells_apart = True

    def __init__(
        self, model: CheckpointModel, classifier: DiffusionClassifier, progress: Callable[[int], None] | None = None
    ) -> None:
        self.model, self.classifier, self.progress = model, classifier, progress

    @property
    def description(self) -> Mapping[str, Any]:
        return {
            "kind": "diffusion classifier (arXiv 2303.16203) made of the original model",
            "denoiser_sha256": self.model.denoiser_hash(),
            "draws": self.classifier.draws,
            "seed": self.classifier.seed,
        }

    def answers(self, images: Tensor, sought: Sequence[Candidate], others: Sequence[Candidate]) -> Tensor:
        """See ``Judge``; every image resembles one of the candidates most."""
        candidates = [*sought, *others]
        conditions = {
            name: torch.cat([candidate.condition[name] for candidate in candidates]) for name in candidates[0].condition
        }
        return self.classifier.classify(samples_of(self.model, images), conditions, self.progress)


@torch.no_grad()
def samples_of(model: CheckpointModel, images: Tensor, *, batch_size: int = 16) -> Tensor:
    """Samples float32 [N, C, h, w] on the host of uint8 images [N, 3, H, W], as the denoiser takes them."""
    encode: Any = model
    parts = []
    for batch in torch.split(images, batch_size):
        sample = encode.encode_images(batch.float() / 127.5 - 1)
        # Models in pixels keep eight bits in the cache.
        parts.append((sample.float() / 127.5 - 1 if sample.dtype == torch.uint8 else sample.float()).cpu())
    return torch.cat(parts)

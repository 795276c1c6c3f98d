"""Features of images, which distances between them are taken in: the base's own, or a local extractor of the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from erasediff.audit.asks import Ask
from erasediff.audit.subject import Subject
from erasediff.errors import UserError
from erasediff.verdict.judges.pictures import batches, pictures
from erasediff.verdict.judges.python_function import current_folder_first
from erasediff.verdict.judges.registry import FUNCTION
from erasediff.verdict.judges.transformers_folder import TransformersFolder

BATCH_SIZE = 64
OWN_TIME = 0.1
"""Share of the timesteps at which the base's features are taken: little noise, as for content in DIFT."""


@dataclass(frozen=True, slots=True)
class Features:
    """Extractor of features.

    Attributes:
        name: Name in "Fréchet distance in NAME features".
        extract: Function of images uint8 [N, 3, H, W] that returns features float32 [N, D] on the host.
        description: Facts that a reader needs in order to repeat it (JSON).
    """

    name: str
    extract: Callable[[Tensor], Tensor]
    description: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, images: Tensor) -> Tensor:
        return self.extract(images)


def features_named(reference: str | None, base: Subject) -> Features:
    """Features by name.

    Args:
        reference: Folder of an image network of transformers, a function "module:function" of images uint8
            [N, 3, H, W] that returns [N, D], or None for the base's own.
        base: The model that its own features are taken of.

    Raises:
        UserError: There is no such folder or function.
    """
    if reference is None:
        return own_features(base)
    if FUNCTION.fullmatch(reference) and not Path(reference).exists():
        return _of_function(reference)
    return _of_folder(Path(reference), base.model.device)


def own_features(base: Subject) -> Features:
    """Activations of the middle of the base's denoiser, a mean over places (DIFT, Tang et al. 2023).

    The null condition and noise of seed 0 at a tenth of the timesteps are the same for all images.
    """
    network, timestep = base.model.denoiser, round(OWN_TIME * (base.process.num_train_timesteps - 1))
    middle = _middle(network)

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        found: list[Tensor] = []
        hook = middle.register_forward_hook(lambda _, inputs, output: found.append(_pooled(output)))
        try:
            for part in batches(images, base.settings.batch_size):
                samples = base.encode(part)
                ids = torch.arange(len(samples))
                alpha, sigma = (table[timestep] for table in (base.process.alpha, base.process.sigma))
                noisy = alpha * samples + sigma * base.noise(ids * 0, 0, 0)
                told = base.process.conditioning[timestep].expand(len(samples))
                base.model.predict(network, noisy, told, base.condition([Ask("", "")] * len(samples)))
        finally:
            hook.remove()
        return torch.cat(found)

    return Features("the base's own denoiser", extract, {"layer": "middle", "timestep": timestep})


def _middle(network: nn.Module) -> nn.Module:
    block = getattr(network, "mid_block", None)
    if isinstance(block, nn.Module):
        return block
    blocks = next(iter(module for module in network.modules() if isinstance(module, nn.ModuleList) and len(module)))
    return blocks[len(blocks) // 2]


def _pooled(output: Any) -> Tensor:
    """Mean over places of activations [B, C, h, w] or tokens [B, L, C]: float32 [B, C] on the host."""
    # Joint blocks return the text's tokens and the image's.
    tensor: Tensor = output if isinstance(output, Tensor) else output[-1]
    return (tensor.flatten(2).mean(2) if tensor.ndim == 4 else tensor.mean(1)).float().cpu()


def _of_folder(folder: Path, device: torch.device) -> Features:
    opened = TransformersFolder.open(folder)
    processor, network = opened.image_processor(), opened.load(transformers.AutoModel, device)
    encoder: Any = getattr(network, "vision_model", network)

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        parts = []
        for part in batches(images, BATCH_SIZE):
            pixels = processor(images=pictures(part), return_tensors="pt")["pixel_values"].to(device)
            output = encoder(pixel_values=pixels)
            pooled = getattr(output, "pooler_output", None)
            pooled = output.last_hidden_state.mean(1) if pooled is None else pooled
            parts.append(pooled.flatten(1).float().cpu())
        return torch.cat(parts)

    return Features(opened.model_type, extract, {"folder": str(folder), "sha256": opened.digests()})


def _of_function(reference: str) -> Features:
    module, _, name = reference.partition(":")
    try:
        with current_folder_first():
            function: Any = getattr(import_module(module), name)
    except Exception as error:
        raise UserError(f"The features {reference} cannot be imported: {_told(error)}.") from error

    def extract(images: Tensor) -> Tensor:
        try:
            return torch.as_tensor(function(images)).float().reshape(len(images), -1)
        except Exception as error:
            raise UserError(f"The features {reference} failed: {_told(error)}.") from error

    return Features(reference, extract)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(".: ")

"""Masks over a network's weights: learned through a straight-through estimator, stored as one bit per weight."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, TypeAdapter
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from erasediff.errors import UserError
from erasediff.io.atomic import atomic_file
from erasediff.io.json_file import parse_json
from erasediff.io.tensor_file import TensorFile
from erasediff_kernels import pack_mask, unpack_mask

FORMAT = "erasediff-mask-1"
SHAPES = TypeAdapter(dict[str, list[NonNegativeInt]])
OUT_OF_REACH = 30.0
"""Score of weights that are never pruned: its derivative, 1e-13, is negligible beside Adam's epsilon."""

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _HardMask(torch.autograd.Function):
    """1[s > 0] = 1[sigmoid(s) > 1/2] forward, the derivative of sigmoid(s) backward (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, score: Tensor) -> Tensor:
        ctx.save_for_backward(score)
        return (score > 0).to(score.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (score,) = ctx.saved_tensors
        return grad * torch.sigmoid(score) * torch.sigmoid(-score)


class WeightMask(nn.Module):
    """Parametrization by a learned mask: the weight where its ``score`` is positive, 0 elsewhere."""

    def __init__(self, weight: Tensor, initial_score: float) -> None:
        super().__init__()
        self.score = nn.Parameter(torch.full_like(weight, initial_score, dtype=torch.float32))
        self.active = True

    def forward(self, weight: Tensor) -> Tensor:
        if not self.active:
            return weight
        mask: Tensor = _HardMask.apply(self.score)
        return weight * mask.to(weight.dtype)


def add_masks(network: nn.Module, names: Sequence[str], initial_score: float) -> list[nn.Parameter]:
    """Mask the weights of linear layers and convolutions, and freeze the network.

    Biases, norms and embeddings are left as they are. A copy of a masked network shares its classes with it: merge only
    one of them.

    Args:
        network: Changed in place.
        names: Names of the selected parameters.
        initial_score: Score of all weights at first, positive to keep them.

    Returns:
        The masks' scores, float32 and shaped like the weights, which are to be trained.

    Raises:
        UserError: No weight of a linear layer or convolution is among ``names``.
    """
    parameters = dict(network.named_parameters())
    layers = maskable_layers(network, names)
    network.requires_grad_(False)
    scores = []
    for name, layer in layers.items():
        mask = WeightMask(parameters[f"{name}.weight"], initial_score)
        parametrize.register_parametrization(layer, "weight", mask)
        scores.append(mask.score)
    return scores


def maskable_layers(network: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Layers, by name, whose weights are among ``names`` and can be masked. UserError if there are none."""
    owners = {name.removesuffix(".weight"): network.get_submodule(name.rpartition(".")[0]) for name in names}
    layers: dict[str, nn.Module] = {
        name: layer for name, layer in owners.items() if f"{name}.weight" in names and isinstance(layer, LAYERS)
    }
    if not layers:
        raise UserError("There is no weight matrix among the selected weights to mask: choose others with --train.")
    return layers


@torch.no_grad()
def limit_masks(network: nn.Module, importance: Mapping[str, Tensor], share: float) -> None:
    """Restrict pruning to the ``share`` of each layer's weights with the largest importance.

    Args:
        network: Network with masks; the scores of all other weights are set to ``OUT_OF_REACH``.
        importance: By the masked module's name, shaped like its weight; weights without positive importance stay, too.
        share: Share of each layer's weights, in 0 .. 1.
    """
    for name, _, mask in weight_masks(network):
        mask.score.masked_fill_(~most_important(importance[name], share), OUT_OF_REACH)


def most_important(importance: Tensor, share: float) -> Tensor:
    """Mask, bool and shaped like ``importance``, of the values that are positive and among the largest ``share``."""
    values = importance.flatten()
    count = max(1, round(share * values.numel()))
    chosen = torch.zeros_like(values, dtype=torch.bool)
    chosen[values.topk(count).indices] = True
    return chosen.reshape(importance.shape) & (importance > 0)


def weight_masks(network: nn.Module) -> Iterator[tuple[str, nn.Module, WeightMask]]:
    """Masks of a network, as (name of the masked module, the module, its mask)."""
    for name, module in network.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            for mask in module.parametrizations.weight:
                if isinstance(mask, WeightMask):
                    yield name, module, mask


def masked_weights(network: nn.Module) -> Iterator[nn.Parameter]:
    """Unmasked weights under the masks."""
    for _, module, _ in weight_masks(network):
        parametrized: Any = module
        yield parametrized.parametrizations.weight.original


@contextmanager
def without_masks(network: nn.Module) -> Iterator[None]:
    """Disable the masks within the block."""
    masks = [mask for _, _, mask in weight_masks(network)]
    for mask in masks:
        mask.active = False
    try:
        yield
    finally:
        for mask in masks:
            mask.active = True


def merge_masks(network: nn.Module) -> dict[str, Tensor]:
    """Merge the masks into the weights; return them, bool, by the weights' names."""
    masked = {f"{name}.weight": (module, mask.score.detach() > 0) for name, module, mask in weight_masks(network)}
    for module, _ in masked.values():
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return {name: mask for name, (_, mask) in masked.items()}


def save_masks(masks: Mapping[str, Tensor], path: Path) -> None:
    """Write bool masks atomically: a bit per weight in C order (``pack_mask``), shapes in the header."""
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    packed = {name: pack_mask(mask.contiguous()).cpu() for name, mask in masks.items()}
    with atomic_file(path) as partial:
        save_file(packed, partial, metadata={FORMAT: json.dumps(shapes, sort_keys=True)})


def load_masks(path: Path) -> dict[str, Tensor]:
    """Read a file of ``save_masks``. UserError for a file that cannot be read or holds no masks."""
    file = TensorFile.open(path)
    try:
        shapes = SHAPES.validate_python(parse_json(file.metadata.get(FORMAT, "null")), strict=True)
    except ValueError:
        raise UserError(f"{path} holds no masks: give the mask.safetensors of a pruning run.") from None
    expected = {name: (torch.uint8, (-(-math.prod(shape) // 8),)) for name, shape in shapes.items()}
    if expected != {name: (stored.dtype, stored.shape) for name, stored in file.tensors.items()}:
        raise UserError(f"{path} is damaged: its masks are not those that it describes.")
    return {name: unpack_mask(stored.load(), shapes[name]) for name, stored in file.tensors.items()}


@torch.no_grad()
def apply_masks(network: nn.Module, masks: Mapping[str, Tensor], original: nn.Module | None = None) -> None:
    """Set the masked-out weights to zero, or to those of ``original``, which undoes a pruning to the bit.

    Args:
        network: Changed in place.
        masks: Bool masks by the weights' names, as ``merge_masks`` returns them.
        original: The network before it was pruned.

    Raises:
        UserError: The masks are of another network.
    """
    weights = network.state_dict()
    for name, mask in masks.items():
        if name not in weights or weights[name].shape != mask.shape:
            raise UserError(f"The masks are of another model: this one has no {name} of shape {tuple(mask.shape)}.")
    replacements = {} if original is None else original.state_dict()
    for name, mask in masks.items():
        weight = weights[name]
        other = replacements[name] if replacements else torch.zeros_like(weight)
        weight.copy_(torch.where(mask.to(weight.device), weight, other))

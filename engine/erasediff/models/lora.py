"""Low-rank adapters of a denoiser (Hu et al. 2021) by peft, and their files with diffusers' and kohya's keys."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from erasediff.errors import UserError
from erasediff.io.atomic import atomic_file
from erasediff.io.tensor_file import StoredTensor, TensorFile, write_tensor_file
from erasediff.models.checkpoint.base import PICKLES
from erasediff.models.checkpoint.original_layout import LAYOUTS

Keys = Literal["diffusers", "kohya"]
ADAPTER = "default"
COMPONENT = {"sd": "unet", "sdxl": "unet", "sd3": "transformer", "flux": "transformer"}
DOWN = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight")
UP = (".lora_B.weight", ".lora_up.weight", ".lora.up.weight")
OF_TEXT_ENCODERS = ("lora_te", "text_encoder")


@dataclass(frozen=True, slots=True)
class Layer:
    """weight += alpha / rank up down, for ``down`` [rank, in, ...] and ``up`` [out, rank, ...]."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def add(
    module: nn.Module, *, rank: int, targets: Collection[str], alpha: float | None = None, seed: int = 0
) -> list[nn.Parameter]:
    """Freeze ``module``, give the layers of ``targets`` an adapter, and return the adapters' parameters, float32.

    targets: names of parameters, as ``selection.select`` returns them; their linear and convolutional layers take part
    alpha:   the adapter's weight times its rank; None for the rank

    The model predicts as before until a step is taken. The global random state is left as it was. UserError where no
    layer among the targets can be adapted.
    """
    if rank < 1:
        raise UserError(f"The rank of a LoRA must be at least 1, not {rank}.")
    names = {name.rpartition(".")[0] for name in targets}
    adapted = [name for name, layer in _adaptable(module) if name in names]
    if not adapted:
        raise UserError("The selection has no linear or convolutional layer that a LoRA could adapt.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(module, dict.fromkeys(adapted, (rank, rank if alpha is None else alpha)))
        return _drawn(module)


def merge(module: nn.Module) -> None:
    """Add the adapters to the weights and remove them: ``module`` has its own layers and names again."""
    for name, layer in list(_adapters(module)):
        layer.merge(safe_merge=True)
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, layer.get_base_layer())


def save(module: nn.Module, path: Path, *, family: str, keys: Keys = "diffusers") -> None:
    """Write the adapters as one safetensors file, atomically, over any that is there.

    "diffusers" is read by ``pipeline.load_lora_weights`` and holds alpha / rank within its values, since not every
    reader looks elsewhere for it. "kohya" is what sd-scripts writes, SDXL's blocks counted as in the original layout.
    UserError for kohya's keys of a family other than sd and sdxl.
    """
    layers = {
        name: Layer(layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.lora_alpha[ADAPTER])
        for name, layer in _adapters(module)
    }
    if not layers:
        raise ValueError("the module has no LoRA to save")
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if keys == "kohya":
            key = _kohya_name(name, family, module)
            tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = layer.down, layer.up
            tensors[f"{key}.alpha"] = torch.tensor(float(layer.alpha))
        else:
            key = f"{COMPONENT[family]}.{name}"
            tensors[f"{key}.lora_A.weight"] = layer.down
            tensors[f"{key}.lora_B.weight"] = layer.up * (layer.alpha / layer.rank)
    with atomic_file(path) as partial:
        write_tensor_file(partial, {key: _held(tensor) for key, tensor in tensors.items()}, {"format": "pt"})


def load(module: nn.Module, path: Path, *, family: str) -> list[nn.Parameter]:
    """Freeze ``module``, add the adapters of a file with either kind of keys, and return their parameters.

    UserError for a file that is missing, damaged, no LoRA, for another family, or that also adapts text encoders.
    """
    if path.suffix in PICKLES:
        raise UserError(f"{path} is a pickle, which can run code when it is opened: give a LoRA as .safetensors.")
    layers = _read(TensorFile.open(path), _known_names(module, family), family)
    adaptable = dict(_adaptable(module))
    for name, layer in layers.items():
        weight = adaptable[name].weight
        if layer.down.shape[1:] != weight.shape[1:] or layer.up.shape[0] != weight.shape[0]:
            raise UserError(f"{path} is a LoRA for another model: its {name} is of another size than this model's.")
    parameters = _inject(module, {name: (layer.rank, layer.alpha) for name, layer in layers.items()})
    with torch.no_grad():
        for name, adapted in _adapters(module):
            adapted.lora_A[ADAPTER].weight.copy_(layers[name].down)
            adapted.lora_B[ADAPTER].weight.copy_(layers[name].up)
    return parameters


def _read(file: TensorFile, known: Mapping[str, str], family: str) -> dict[str, Layer]:
    """The layers of a file by the names of the modules they adapt; ``known``: from the names that files give them."""
    alphas = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))
    layers = {}
    for key, down in file.tensors.items():
        if key.startswith(OF_TEXT_ENCODERS):
            raise UserError(
                f"{file.path} also adapts text encoders, which are not trained here: give one for the denoiser."
            )
        suffix = next((suffix for suffix in DOWN if key.endswith(suffix)), None)
        if suffix is None:
            continue
        base = key.removesuffix(suffix)
        if base not in known:
            raise UserError(
                f"{file.path} is a LoRA for another model: this one, of the family {family}, has no {base}."
            )
        up = file.tensors.get(base + UP[DOWN.index(suffix)])
        if up is None or len(up.shape) < 2 or up.shape[1] != down.shape[0]:
            raise UserError(f"{file.path} is damaged: {base} lacks the other half of its adapter.")
        alpha = file.tensors.get(f"{base}.alpha")
        recorded = alphas.get(f"{COMPONENT[family]}.lora_alpha", down.shape[0])
        layers[known[base]] = Layer(
            down.load(), up.load(), float(alpha.load()) if alpha is not None else float(recorded)
        )
    if not layers:
        raise UserError(f"{file.path} is not a LoRA: it holds no adapter.")
    return layers


def _known_names(module: nn.Module, family: str) -> dict[str, str]:
    known = {}
    for name, _ in _adaptable(module):
        known[f"{COMPONENT[family]}.{name}"] = known[f"base_model.model.{name}"] = known[name] = name
        known["lora_unet_" + name.replace(".", "_")] = name
        if family == "sdxl":
            known[_kohya_name(name, family, module)] = name
    return known


def _kohya_name(name: str, family: str, module: Any) -> str:
    if family == "sdxl":
        place = LAYOUTS["sdxl"]["unet"](f"{name}.weight", module.config)
        assert place is not None
        name = place.key.removeprefix("model.diffusion_model.").removesuffix(".weight")
    elif family != "sd":
        raise UserError(f"A LoRA of the family {family} has no kohya keys here: save it with diffusers' keys.")
    return "lora_unet_" + name.replace(".", "_")


def _inject(module: nn.Module, sizes: Mapping[str, tuple[int, float]]) -> list[nn.Parameter]:
    """Adapters of the given (rank, alpha), and everything else frozen."""
    if any(True for _ in _adapters(module)):
        raise ValueError("the module has a LoRA already: merge it first")
    config = LoraConfig(
        target_modules=list(sizes),
        rank_pattern={name: rank for name, (rank, _) in sizes.items()},
        alpha_pattern={name: alpha for name, (_, alpha) in sizes.items()},
    )
    inject_adapter_in_model(config, module, ADAPTER)
    adapters = [
        part for _, layer in _adapters(module) for part in (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
    ]
    for adapter in adapters:
        adapter.data = adapter.data.float()
    return adapters


def _drawn(module: nn.Module) -> list[nn.Parameter]:
    """Adapters with the values that the paper begins with, on the host where the module has no weights yet."""
    adapters = []
    draws: dict[str, Callable[[Tensor], Tensor]] = {
        "lora_A": partial(nn.init.kaiming_uniform_, a=math.sqrt(5)),
        "lora_B": nn.init.zeros_,
    }
    for _, layer in _adapters(module):
        for half, draw in draws.items():
            adapter = getattr(layer, half)[ADAPTER]
            values = draw(torch.empty(adapter.weight.shape))
            adapter.weight = nn.Parameter(values if adapter.weight.is_meta else values.to(adapter.weight.device))
            adapters.append(adapter.weight)
    return adapters


def _adaptable(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d)))


def _adapters(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, LoraLayer))


def _held(tensor: Tensor) -> StoredTensor:
    return StoredTensor(tensor.dtype, tuple(tensor.shape), lambda: tensor)

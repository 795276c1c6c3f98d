"""Low-rank adapters of a denoiser (Hu et al. 2021) by peft: added, merged, saved and loaded."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from erasediff.errors import RunFailedError, UserError
from erasediff.io.atomic import atomic_file
from erasediff.io.tensor_file import StoredTensor, write_tensor_file
from erasediff.models.checkpoint.base import PICKLES, canonical_name
from erasediff.models.checkpoint.components import empty_module
from erasediff.models.family import ModelFamily, family_named
from erasediff.models.lora_file import Updates, read_updates
from erasediff.models.lora_keys import names_in_files
from erasediff.models.lora_update import Adapter, Change
from erasediff.utils.finite import first_not_finite

if TYPE_CHECKING:
    from erasediff.models.checkpoint_model import CheckpointModel

Keys = Literal["diffusers", "kohya"]
ADAPTER = "default"
HALVES = ("lora_A", "lora_B")
ADAPTABLE = (nn.Linear, nn.Conv2d)


def add(
    module: nn.Module, *, rank: int, targets: Collection[str], alpha: float | None = None, seed: int = 0
) -> list[nn.Parameter]:
    """Freeze ``module`` and give the layers of ``targets`` an adapter.

    The model predicts as before until a step is taken. The global random state is left as it was.

    Args:
        module: The denoiser.
        rank: The adapters' rank, at least 1.
        targets: Names of parameters, as ``trainable.select`` returns them; their linear and convolutional layers take
            part.
        alpha: The adapter's scale times its rank; None for the rank.
        seed: Of the adapters' first values.

    Returns:
        The adapters' parameters, float32.

    Raises:
        UserError: No layer among the targets can be adapted.
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
        return _initialised(module)


def merge(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Add the adapters to the weights and remove them: ``module`` has its own layers and names again.

    Args:
        module: The denoiser, with adapters.
        dtype: Dtype of the adapted layers from then on, in which the sum is formed; None for their own. Layers of
            another dtype move to the host for it, one by one.
    """
    for name, layer in list(_adapters(module)):
        if dtype is not None and layer.get_base_layer().weight.dtype != dtype:
            layer.to("cpu").get_base_layer().to(dtype)
        layer.merge(safe_merge=True)
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, layer.get_base_layer())


def check_trained(module: nn.Module) -> None:
    """RunFailedError for adapters that are not finite, or that change nothing since every up-projection is still 0."""
    halves = [
        (f"{name}.{half}", getattr(layer, half)[ADAPTER].weight) for name, layer in _adapters(module) for half in HALVES
    ]
    if (broken := first_not_finite(halves)) is not None:
        raise RunFailedError(
            f"The LoRA diverged, since {broken} is not finite, and was not saved: lower the learning rate."
        )
    if not any(bool(weight.any()) for name, weight in halves if name.endswith(".lora_B")):
        raise RunFailedError(
            "The LoRA is zero, as before the first step, and was not saved: take more steps, or larger ones."
        )


def save(module: nn.Module, path: Path, *, family: str, keys: Keys = "diffusers") -> None:
    """Write the adapters as one safetensors file, atomically, over any that is there.

    Args:
        module: The denoiser, with adapters of ``add``.
        path: The file.
        family: The model's ``ModelFamily.family``.
        keys: "diffusers" is read by ``pipeline.load_lora_weights`` and holds alpha / rank within its values, since not
            every reader looks elsewhere for it. "kohya" is what sd-scripts writes, SDXL's blocks counted as in the
            original layout.

    Raises:
        UserError: The family has no kohya keys.
        ValueError: There are no adapters, or they are DoRA's or have biases.
    """
    cls = family_named(family)
    adapters = {}
    for name, layer in _adapters(module):
        if layer.use_dora.get(ADAPTER) or layer.lora_bias[ADAPTER]:
            raise ValueError("a LoRA with DoRA's magnitudes or biases has no keys here: merge it")
        alpha = layer.lora_alpha[ADAPTER]
        adapters[name] = Adapter(layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, alpha)
    if not adapters:
        raise ValueError("the module has no LoRA to save")
    tensors: dict[str, StoredTensor] = {}
    for name, adapter in adapters.items():
        key = _kohya_key(name, cls, module) if keys == "kohya" else f"{cls.denoiser_component}.{name}"
        tensors |= _entries(adapter, key, kohya=keys == "kohya")
    with atomic_file(path) as partial:
        write_tensor_file(partial, tensors, {"format": "pt"})


def load(module: nn.Module, path: Path, *, family: str) -> list[nn.Parameter]:
    """Freeze ``module`` and add the adapters of a LoRA file, DoRA's included, to be trained on or merged.

    Args:
        module: The denoiser.
        path: A .safetensors file, see ``lora_file.read_updates``.
        family: The model's ``ModelFamily.family``.

    Returns:
        The adapters' parameters, float32.

    Raises:
        UserError: The file is missing, damaged, a pickle, no LoRA, for another model, also for text encoders, or holds
            anything that is no low-rank adapter of a linear or convolutional layer, which ``merge_file`` may take.
    """
    cls = family_named(family)
    adapters = {}
    for (_, name), updates in _read(path, cls, {cls.denoiser_component: module}).items():
        match updates:
            case [Adapter() as adapter]:
                adapters[name] = adapter
            case _:
                raise UserError(f"{path} changes {name} by more than an adapter: merge it with lora.merge_file.")
    return _add(module, adapters)


def merge_file(model: CheckpointModel, path: Path) -> None:
    """Merge a LoRA file into a model's denoiser and text encoders: all that it holds, or nothing.

    Args:
        model: With a denoiser that has its weights; text encoders are changed as they are read.
        path: A .safetensors file, see ``lora_file.read_updates``.

    Raises:
        UserError: The file is missing, damaged, a pickle, no LoRA, for another model, or holds anything that is not
            applied.
    """
    merge_into_encoders(model, path)
    merge_into_denoiser(model, path)


def merge_into_denoiser(model: CheckpointModel, path: Path) -> None:
    """The half of ``merge_file`` that needs the denoiser's weights."""
    updates = _of_denoiser(model, _updates_of(model, path))
    adapters = {name: first for name, (first, *_) in updates.items() if isinstance(first, Adapter)}
    if adapters:
        _add(model.denoiser, adapters)
        merge(model.denoiser)
    with torch.no_grad():
        for name, changes in updates.items():
            layer: Any = model.denoiser.get_submodule(name)
            for change in changes[1:] if name in adapters else changes:
                change = change.change() if isinstance(change, Adapter) else change
                layer.weight.copy_(change.applied(layer.weight))
                if change.bias is not None:
                    layer.bias.add_(change.bias.to(layer.bias))


def merge_into_encoders(model: CheckpointModel, path: Path) -> None:
    """The half of ``merge_file`` that does not need the denoiser's weights; all errors are seen by then."""
    changes: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {}
    for (component, name), updates in _updates_of(model, path).items():
        if component == model.denoiser_component:
            continue
        own = changes.setdefault(component, {})
        parts = [part.change() if isinstance(part, Adapter) else part for part in updates]
        own[canonical_name(f"{name}.weight")] = functools.partial(_changed_weight, parts)
        if any(part.bias is not None for part in parts):
            own[canonical_name(f"{name}.bias")] = functools.partial(_changed_bias, parts)
    if changes:
        model.change_encoders(changes)


def _changed_weight(changes: Iterable[Change], weight: Tensor) -> Tensor:
    for change in changes:
        weight = change.applied(weight)
    return weight


def _changed_bias(changes: Iterable[Change], bias: Tensor) -> Tensor:
    return bias.float() + sum(change.bias.float() for change in changes if change.bias is not None)


def _of_denoiser(model: CheckpointModel, updates: Updates) -> dict[str, list[Adapter | Change]]:
    return {name: changes for (component, name), changes in updates.items() if component == model.denoiser_component}


def _updates_of(model: CheckpointModel, path: Path) -> Updates:
    encoders = {name: empty_module(model.checkpoint, name) for name in model.encoder_names}
    return _read(path, type(model), {model.denoiser_component: model.denoiser, **encoders})


def _read(path: Path, family: type[ModelFamily], modules: Mapping[str, nn.Module]) -> Updates:
    """The file's changes in the shapes of the layers. UserError for those that do not fit, and as ``read_updates``."""
    if path.suffix in PICKLES:
        raise UserError(f"{path} is a pickle, which can run code when it is opened: give a LoRA as .safetensors.")
    updates = read_updates(path, names_in_files(modules, family), family.denoiser_component)
    return {
        (component, name): [_fitted(path, name, modules[component].get_submodule(name), change) for change in changes]
        for (component, name), changes in updates.items()
    }


def _fitted(path: Path, name: str, layer: Any, change: Adapter | Change) -> Adapter | Change:
    weight = layer.weight
    if isinstance(change, Adapter):
        inner, ones = tuple(weight.shape[1:]), (1,) * (weight.ndim - 2)
        if not isinstance(layer, ADAPTABLE):
            raise UserError(f"{path} cannot be applied: {name} is a {type(layer).__name__}, which has no LoRA here.")
        # A linear layer and a 1 x 1 convolution are the same, and files may hold either.
        fits = _squeezed(change.down.shape[1:]) == _squeezed(inner) and not _squeezed(change.up.shape[2:])
        if fits and change.outputs == len(weight):
            down, up = change.down.reshape(change.rank, *inner), change.up.reshape(*change.up.shape[:2], *ones)
            change = dataclasses.replace(change, down=down, up=up)
        else:
            fits = False
    else:
        fits = change.weight is None or change.size == (len(weight), weight.numel())
    if not fits:
        raise UserError(f"{path} is a LoRA for another model: its {name} is of another size than this model's.")
    if change.bias is not None and layer.bias is None:
        raise UserError(f"{path} is a LoRA for another model: it adds to the bias of {name}, which has none.")
    if change.bias is not None and change.bias.shape != layer.bias.shape:
        raise UserError(f"{path} is a LoRA for another model: its bias of {name} is of another size than this model's.")
    return change


def _squeezed(shape: Sequence[int]) -> list[int]:
    """The shape without trailing ones."""
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return sizes


def _add(module: nn.Module, adapters: Mapping[str, Adapter]) -> list[nn.Parameter]:
    parameters = _inject(
        module,
        {name: (adapter.rank, adapter.alpha) for name, adapter in adapters.items()},
        dora=any(adapter.magnitude is not None for adapter in adapters.values()),
    )
    with torch.no_grad():
        for name, layer in _adapters(module):
            _fill(layer, adapters[name])
    return parameters + [parameter for _, layer in _adapters(module) for parameter in _extra_parameters(layer)]


def _fill(layer: Any, adapter: Adapter) -> None:
    layer.lora_A[ADAPTER].weight.copy_(adapter.down)
    layer.lora_B[ADAPTER].weight.copy_(adapter.up)
    if adapter.bias is not None:
        # peft gives either all layers such a bias or none.
        layer.lora_B[ADAPTER].bias = nn.Parameter(adapter.bias.to(layer.lora_B[ADAPTER].weight))
        layer.lora_bias[ADAPTER] = True
    if adapter.magnitude is not None:
        magnitude = layer.lora_magnitude_vector[ADAPTER]
        magnitude.weight.data = adapter.magnitude.to(layer.lora_B[ADAPTER].weight).reshape(magnitude.weight.shape)
        magnitude._cache_clear()


def _extra_parameters(layer: Any) -> Iterator[nn.Parameter]:
    if layer.lora_bias[ADAPTER]:
        yield layer.lora_B[ADAPTER].bias
    if ADAPTER in layer.lora_magnitude_vector:
        yield layer.lora_magnitude_vector[ADAPTER].weight


def _kohya_key(name: str, cls: type[ModelFamily], module: nn.Module) -> str:
    original = cls.kohya_name(name, module)
    if original is None:
        raise UserError(f"A LoRA of the family {cls.family} has no kohya keys here: save it with diffusers' keys.")
    return "lora_unet_" + original.replace(".", "_")


def _inject(module: nn.Module, sizes: Mapping[str, tuple[int, float]], *, dora: bool = False) -> list[nn.Parameter]:
    """Adapters of the given (rank, alpha), and everything else frozen."""
    if any(True for _ in _adapters(module)):
        raise ValueError("the module has a LoRA already: merge it first")
    # peft takes plain names for the ends of names, and would also adapt a.b where b is asked for.
    exact = {name: re.escape(name) for name in sizes}
    config = LoraConfig(
        target_modules="|".join(exact.values()),
        rank_pattern={f"^{exact[name]}": rank for name, (rank, _) in sizes.items()},
        alpha_pattern={f"^{exact[name]}": alpha for name, (_, alpha) in sizes.items()},
        use_dora=dora,
    )
    inject_adapter_in_model(config, module, ADAPTER)
    adapters = [
        part for _, layer in _adapters(module) for part in (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
    ]
    for adapter in adapters:
        adapter.data = adapter.data.float()
    return adapters


def _initialised(module: nn.Module) -> list[nn.Parameter]:
    """Adapters with the values that the paper begins with, on the host where the module has no weights yet."""
    adapters = []
    initialisers: dict[str, Callable[[Tensor], Tensor]] = {
        "lora_A": functools.partial(nn.init.kaiming_uniform_, a=math.sqrt(5)),
        "lora_B": nn.init.zeros_,
    }
    for _, layer in _adapters(module):
        for half, initialise in initialisers.items():
            adapter = getattr(layer, half)[ADAPTER]
            values = initialise(torch.empty(adapter.weight.shape))
            adapter.weight = nn.Parameter(values if adapter.weight.is_meta else values.to(adapter.weight.device))
            adapters.append(adapter.weight)
    return adapters


def _adaptable(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, ADAPTABLE))


def _adapters(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, LoraLayer))


def _entries(adapter: Adapter, key: str, *, kohya: bool) -> dict[str, StoredTensor]:
    """The entries of one layer; diffusers' hold the scale within ``up``, since not every reader looks for it."""
    if kohya:
        tensors = {
            f"{key}.lora_down.weight": adapter.down,
            f"{key}.lora_up.weight": adapter.up,
            f"{key}.alpha": torch.tensor(float(adapter.alpha)),
        }
    else:
        tensors = {
            f"{key}.lora_A.weight": adapter.down,
            f"{key}.lora_B.weight": adapter.up * (adapter.alpha / adapter.rank),
        }
    return {
        name: StoredTensor(value.dtype, tuple(value.shape), functools.partial(_same, value))
        for name, value in tensors.items()
    }


def _same(tensor: Tensor) -> Tensor:
    return tensor

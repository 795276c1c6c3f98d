"""Modules from a checkpoint's configurations and weights, checked before any memory is spent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from erasediff.errors import UserError
from erasediff.models.checkpoint import Checkpoint, has
from erasediff.models.names import canonical_name
from erasediff.models.tensor_file import StoredTensor

Weights = Mapping[str, Callable[[], Tensor]]
"""The entries of a module's state_dict, each read from the disk when it is called for."""
LIBRARIES = ("diffusers", "transformers")


def component_class(checkpoint: Checkpoint, component: str) -> Any:
    """UserError for a missing component, and for a class of another library than diffusers and transformers."""
    if not has(checkpoint, component):
        raise UserError(f"The checkpoint {checkpoint.path} is incomplete: it has no {component}.")
    library, name = checkpoint.index[component]
    cls = getattr(import_module(library), name, None) if library in LIBRARIES else None
    if cls is None:
        raise UserError(f"The {component} of {checkpoint.path} is a {library}.{name}, which is not known here.")
    return cls


def empty_module(checkpoint: Checkpoint, component: str) -> nn.Module:
    """The component with its parameters on the meta device."""
    cls = component_class(checkpoint, component)
    config = checkpoint.config(component)
    if config.get("_class_name", cls.__name__) != cls.__name__:
        raise UserError(f"The {component} of {checkpoint.path} is a {config['_class_name']}, not a {cls.__name__}.")
    try:
        with init_empty_weights(include_buffers=False):
            module: nn.Module = (
                cls(cls.config_class.from_dict(config)) if hasattr(cls, "config_class") else cls.from_config(config)
            )
    except (TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"The configuration of {component} in {checkpoint.path} is damaged: {reason}.") from error
    return module


def check_component(checkpoint: Checkpoint, component: str) -> nn.Module:
    """The component as ``empty_module``, its stored weights' names and shapes checked. UserError for a mismatch."""
    module = empty_module(checkpoint, component)
    stored = {canonical_name(name): tensor.shape for name, tensor in checkpoint.tensors(component).items()}
    tied = getattr(module, "_tied_weights_keys", None) or ()
    for name, tensor in module.state_dict().items():
        shape = stored.get(canonical_name(name))
        if shape is None and name not in tied:
            raise UserError(f"The {component} of {checkpoint.path} is incomplete: it has no weight {name}.")
        if shape is not None and _without_trailing_ones(shape) != _without_trailing_ones(tensor.shape):
            raise UserError(
                f"The {component} of {checkpoint.path} does not fit its configuration: {name} is "
                f"{list(shape)}, the configuration asks for {list(tensor.shape)}."
            )
    return module


def _without_trailing_ones(shape: tuple[int, ...]) -> list[int]:
    """The shape without trailing ones: a 1x1 convolution and the linear layer that became of it are the same weight."""
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return sizes


def stored_weights(checkpoint: Checkpoint, component: str, module: nn.Module, dtype: torch.dtype) -> Weights:
    """What the checkpoint holds of ``module``, which is its empty component, in the shapes and dtypes it will have."""
    stored = {canonical_name(name): tensor for name, tensor in checkpoint.tensors(component).items()}
    # T5's largest layers overflow in float16, and it is written to have them in float32.
    wide = set(getattr(module, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()

    def loading(name: str, source: StoredTensor, shape: torch.Size) -> Callable[[], Tensor]:
        target = source.dtype
        if source.dtype.is_floating_point:
            target = torch.float32 if wide & set(name.split(".")) else dtype
        return lambda: source.load().reshape(shape).to(target)

    return {
        name: loading(name, source, tensor.shape)
        for name, tensor in module.state_dict().items()
        if (source := stored.get(canonical_name(name))) is not None
    }


def load_component(checkpoint: Checkpoint, component: str, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """The component with its own copy of the stored weights, in evaluation mode. UserError as ``check_component``."""
    module: Any = check_component(checkpoint, component)
    weights = stored_weights(checkpoint, component, module, dtype)
    state = {name: load().to(device, copy=True) for name, load in weights.items()}
    module.load_state_dict(state, strict=False, assign=True)
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    loaded: nn.Module = module.to(device).eval()
    return loaded

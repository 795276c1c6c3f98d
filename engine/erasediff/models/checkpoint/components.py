"""Modules from a checkpoint's configurations and weights, checked before any memory is spent."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from inspect import signature
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from erasediff.diffusion.noise_schedule import is_flow_matching
from erasediff.errors import UserError
from erasediff.io.tensor_file import LazyWeights, StoredTensor
from erasediff.models.checkpoint.base import Checkpoint, canonical_name, has
from erasediff.models.checkpoint.quantized import ADVICE, refuse_quantized
from erasediff.models.latent_statistics import check_latent_statistics
from erasediff.utils.finite import finite_weight

LIBRARIES = ("diffusers", "transformers")


def component_class(checkpoint: Checkpoint, component: str) -> Any:
    """Class of a component. UserError if it is missing, or not a class of diffusers or transformers."""
    if not has(checkpoint, component):
        raise UserError(f"The checkpoint {checkpoint.path} is incomplete: it has no {component}.")
    library, name = checkpoint.index[component]
    cls = getattr(import_module(library), name, None) if library in LIBRARIES else None
    if not isinstance(cls, type) or not issubclass(cls, (nn.Module, diffusers.SchedulerMixin)):
        raise UserError(f"The {component} of {checkpoint.path} is a {library}.{name}, which is not known here.")
    return cls


def empty_module(checkpoint: Checkpoint, component: str) -> nn.Module:
    """Build a component with its parameters on the meta device. UserError for a damaged configuration."""
    cls = component_class(checkpoint, component)
    config = checkpoint.config(component)
    check_sizes(f"{component} of {checkpoint.path}", config)
    if config.get("_class_name", cls.__name__) != cls.__name__:
        raise UserError(f"The {component} of {checkpoint.path} is a {config['_class_name']}, not a {cls.__name__}.")
    try:
        with init_empty_weights(include_buffers=False):
            module: nn.Module = (
                cls(cls.config_class.from_dict(config)) if hasattr(cls, "config_class") else cls.from_config(config)
            )
    except MemoryError:
        raise
    except Exception as error:  # Constructors check little of what they are given, each in its own way.
        raise _damaged(checkpoint, component, error) from error
    return module


def _damaged(checkpoint: Checkpoint, component: str, error: Exception) -> UserError:
    # The first line: torch adds a list of frames.
    reason = " ".join(str(error).partition("\n")[0].split())[:300].rstrip(".") or type(error).__name__
    return UserError(f"The configuration of {component} in {checkpoint.path} is damaged: {reason}.")


LARGEST_SIZES = {
    re.compile(r".*layers.*|.*depth.*"): 1000,
    re.compile(r"pos_embed_max_size"): 2048,
    re.compile(r"sample_size"): 16_384,
    re.compile(r"num_train_timesteps|max_position_embeddings|vocab_size|num_embeds.*"): 10_000_000,
}
"""Largest values of settings that a constructor takes memory or time for at once, far above those of any model."""


def check_sizes(owner: str, config: Mapping[str, Any]) -> None:
    """Raise UserError for a setting of the component ``owner`` by which building it would take all memory or time."""
    for name, value in config.items():
        for pattern, largest in LARGEST_SIZES.items():
            if pattern.fullmatch(name) and any(number > largest for number in _numbers(value)):
                raise UserError(f"The configuration of {owner} is damaged: its {name} is larger than {largest:,}.")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value


def check_component(checkpoint: Checkpoint, component: str) -> nn.Module:
    """Build a component as ``empty_module``; check its weights' names and shapes. UserError for a mismatch."""
    component_class(checkpoint, component)
    owner, config = f"{component} of {checkpoint.path}", checkpoint.config(component)
    refuse_quantized(owner, config)
    check_latent_statistics(owner, config)
    module = empty_module(checkpoint, component)
    weights = {canonical_name(name): tensor for name, tensor in checkpoint.tensors(component).items()}
    tied = getattr(module, "_tied_weights_keys", None) or ()
    for name, tensor in module.state_dict().items():
        stored = weights.get(canonical_name(name))
        if stored is None and name not in tied:
            raise UserError(f"The {component} of {checkpoint.path} is incomplete: it has no weight {name}.")
        if stored is None:
            continue
        shape = stored.shape
        if tensor.is_floating_point() and not stored.dtype.is_floating_point:
            raise UserError(f"The {component} of {checkpoint.path} is quantized ({name} is {stored.dtype}): {ADVICE}.")
        if _without_trailing_ones(shape) != _without_trailing_ones(tensor.shape):
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


def stored_weights(checkpoint: Checkpoint, component: str, module: nn.Module, dtype: torch.dtype) -> LazyWeights:
    """Lazy weights of ``module``, an empty component, from the checkpoint, in their final shapes and dtypes.

    Reading one raises UserError if it holds NaN or infinity.
    """
    owner = f"{component} of {checkpoint.path}"
    stored = {canonical_name(name): tensor for name, tensor in checkpoint.tensors(component).items()}
    # T5's largest layers overflow in float16, and it is written to have them in float32.
    wide = set(getattr(module, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()

    def loading(name: str, source: StoredTensor, shape: torch.Size) -> Callable[[], Tensor]:
        target = source.dtype
        if source.dtype.is_floating_point:
            target = torch.float32 if wide & set(name.split(".")) else dtype
        return lambda: finite_weight(source.load().reshape(shape).to(target), owner, name)

    return {
        name: loading(name, source, tensor.shape)
        for name, tensor in module.state_dict().items()
        if (source := stored.get(canonical_name(name))) is not None
    }


def fill_component(module: nn.Module, weights: LazyWeights, device: torch.device | str) -> nn.Module:
    """Fill an empty ``module`` with its own copy of ``weights`` on ``device``, in evaluation mode."""
    filled: Any = module
    filled.load_state_dict(
        {name: load().to(device, copy=True) for name, load in weights.items()}, strict=False, assign=True
    )
    if hasattr(filled, "tie_weights"):
        filled.tie_weights()
    loaded: nn.Module = filled.to(device).eval()
    return loaded


def load_component(checkpoint: Checkpoint, component: str, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """Load a component with its own copy of the weights, in evaluation mode. UserError as ``check_component``."""
    module = check_component(checkpoint, component)
    return fill_component(module, stored_weights(checkpoint, component, module, dtype), device)


def _check_schedule(scheduler: Any) -> None:
    """Raise ValueError for a schedule of numbers that are no signal levels, or one that cannot be sampled by."""
    levels = getattr(scheduler, "alphas_cumprod", None)
    if levels is None:
        return
    if levels.ndim != 1 or len(levels) == 0:
        raise ValueError("its schedule is no list of numbers")
    if not bool(((levels >= 0) & (levels <= 1)).all()):
        raise ValueError("its schedule leaves the interval from 0 to 1")
    # On a copy, which is left as after some sampling.
    type(scheduler).from_config(scheduler.config).set_timesteps(min(4, len(levels)))


def takes_zero_snr(scheduler: str) -> bool:
    """Whether diffusers' scheduler of this name can have a schedule that ends in pure noise."""
    return "rescale_betas_zero_snr" in signature(getattr(diffusers, scheduler, object).__init__).parameters


MODELSPEC_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction", "sample": "sample"}


def load_scheduler(checkpoint: Checkpoint, *, flow: bool) -> Any:
    """Load the scheduler as diffusers builds it, and check it against the network's kind and the weights' metadata.

    Args:
        checkpoint: Where the scheduler's class and configuration come from.
        flow: Whether the network is trained by flow matching.

    Raises:
        UserError: The scheduler has no noise schedule that can be trained on, or contradicts the network: it is of the
            other kind; it predicts epsilon under a schedule that ends in pure noise, where epsilon says nothing about
            the image (Lin et al. 2023, section 3.2); its class cannot have that schedule; or it predicts another type
            than the weights' own ModelSpec metadata records.
    """
    cls = component_class(checkpoint, "scheduler")
    config = checkpoint.config("scheduler")
    if not issubclass(cls, diffusers.SchedulerMixin):
        raise UserError(f"The scheduler of {checkpoint.path} is a {cls.__name__}, which is none.")
    check_sizes(f"scheduler of {checkpoint.path}", config)
    try:
        scheduler = cls.from_config(config)
        _check_schedule(scheduler)
    except MemoryError:
        raise
    except Exception as error:
        raise _damaged(checkpoint, "scheduler", error) from error
    contradiction = f"The scheduler of {checkpoint.path} contradicts its network: "
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    if not flow and prediction_type not in MODELSPEC_PREDICTIONS.values():
        raise UserError(
            f"{contradiction}its prediction_type {prediction_type!r} is none of epsilon, v_prediction, sample."
        )
    try:
        is_flow = is_flow_matching(scheduler)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"The scheduler of {checkpoint.path} cannot be used: {error}.") from error
    if flow != is_flow:
        kind = "by flow matching" if flow else "by denoising diffusion"
        raise UserError(f"{contradiction}{cls.__name__} is not for a network trained {kind}.")
    if flow:
        return scheduler
    if prediction_type == "epsilon" and config.get("rescale_betas_zero_snr"):
        raise UserError(
            f"{contradiction}it predicts epsilon, but rescale_betas_zero_snr makes the last timestep pure noise, which "
            "only v_prediction can be trained on."
        )
    if config.get("rescale_betas_zero_snr") and not takes_zero_snr(cls.__name__):
        raise UserError(
            f"{contradiction}rescale_betas_zero_snr asks for a schedule that ends in pure noise, which {cls.__name__} "
            "cannot have: give DDIMScheduler, or remove it."
        )
    recorded = MODELSPEC_PREDICTIONS.get(checkpoint.metadata.get("modelspec.prediction_type", ""))
    if recorded not in (None, prediction_type):
        raise UserError(f"{contradiction}its prediction_type is {prediction_type}, the weights record {recorded}.")
    return scheduler

"""DeepSpeed engine: version check, autocast, clipping, accumulation boundary, gathered parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

TRIED = ((0, 19), (0, 20))
"""The first version that is known to have these names, and the first that is not."""


def is_engine(model: object) -> bool:
    """Whether ``model`` is a DeepSpeed engine; does not import DeepSpeed."""
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine)


@contextmanager
def autocast(model: object, device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """``torch.autocast`` that holds within a DeepSpeed engine too, or nothing if ``dtype`` is None.

    On an accelerator an engine turns off what surrounds it, unless its own configuration asks for the same.
    """
    if dtype is None:
        yield
        return
    engine: Any = model if is_engine(model) else None
    if engine is not None:
        engine.torch_autocast_enabled, engine.torch_autocast_dtype = lambda: True, lambda: dtype
    try:
        with torch.autocast(device.type, dtype):
            yield
    finally:
        if engine is not None:
            del engine.torch_autocast_enabled, engine.torch_autocast_dtype


def check_engine(engine: Any) -> None:
    """``ValueError`` for a version, or a kind of engine, whose gradients are elsewhere than here."""
    installed = tuple(int(part) for part in version("deepspeed").split(".")[:2])
    if not TRIED[0] <= installed < TRIED[1]:
        raise ValueError(f"DeepSpeed {version('deepspeed')} was never tried here: install deepspeed>=0.19,<0.20")
    zero = engine._config.zero_config
    offload = zero.offload_optimizer
    refused = {
        "float16 with loss scaling: use bf16, which needs none": engine.fp16_enabled()
        or engine.torch_autocast_z0_gradscaler is not None
        or getattr(engine.optimizer, "torch_autocast_gradscaler", None) is not None,
        "pipeline parallelism": engine.pipeline_parallelism,
        "mixtures of experts": engine.has_moe_layers,
        "managed_gradient_accumulation=false": not engine.managed_gradient_accumulation(),
        "DeepCompile": engine.is_deepcompile_enabled(),
        "ZenFlow": bool(engine.zenflow),
        "SuperOffload": engine.super_offload(),
        "a second partition of the weights (zero_hpz_partition_size)": zero.zero_hpz_partition_size > 1,
        "model parallelism": engine.dp_world_size != torch.distributed.get_world_size(),
        "offloading to NVMe: offload to the CPU": "nvme"
        in {str(getattr(part, "device", None)).rpartition(".")[2] for part in (offload, zero.offload_param)},
        "a share of the optimizer offloaded (offload_optimizer.ratio)": offload is not None and offload.ratio != 1.0,
        "no optimizer": engine.optimizer is None,
    }
    for what, is_so in refused.items():
        if is_so:
            raise ValueError(f"this DeepSpeed engine uses {what}; unlearning does not support that")


@contextmanager
def patched(target: Any, **attributes: Any) -> Iterator[None]:
    """Set attributes of the instance ``target`` within the block; those that it had itself come back, others go."""
    before = {name: vars(target)[name] for name in attributes if name in vars(target)}
    vars(target).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            vars(target).pop(name, None)
        vars(target).update(before)


def engine_clipping(engine: Any) -> float | None:
    """Largest gradient norm that the engine's configuration allows; None if it does not clip."""
    return float(engine._config.gradient_clipping) or None


@contextmanager
def engine_clipping_disabled(engine: Any) -> Iterator[None]:
    """Within the block ``engine.step`` does not clip: the constrained step has clipped the combination."""
    with ExitStack() as stack:
        stack.enter_context(patched(engine._config, gradient_clipping=0.0))
        if hasattr(engine.optimizer, "clip_grad"):
            stack.enter_context(patched(engine.optimizer, clip_grad=0.0))
        yield


def set_global_grad_norm(engine: Any, norm: Tensor) -> None:
    """Set the result of ``engine.get_global_grad_norm``: the engine's own would be the retain gradient's."""
    engine._global_grad_norm = norm


def reset_accumulation_boundary(engine: Any) -> None:
    """The engine counts its accumulation steps itself again, as before ``set_gradient_accumulation_boundary``."""
    engine._is_gradient_accumulation_boundary = None


def reset_timers(engine: Any) -> None:
    """Stop the engine's timers that a pass which raised has left running, so that they can be started again."""
    for timer in engine.timers.get_timers().values():
        timer.reset()


def gathered(*parameters: Tensor) -> AbstractContextManager[object]:
    """Those of ``parameters`` that ZeRO-3 has partitioned are whole within the block, on each process."""
    cut = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not cut:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(cut)  # type: ignore[no-any-return]


@contextmanager
def without_shared_memory_op() -> Iterator[None]:
    """Within the block DeepSpeed joins CPU processes by gloo alone, not by an operator that it compiles for minutes."""
    import deepspeed

    name, operators = "deepspeed_shm_comm", deepspeed.ops.__compatible_ops__
    before = operators.get(name, False)
    operators[name] = False
    try:
        yield
    finally:
        operators[name] = before


def partitioner(config: dict[str, Any]) -> Callable[[nn.Parameter], None]:
    """Function that partitions one parameter as ZeRO-3 under ``config`` does, with the first process's values.

    Every process must call it for the same parameters in the same order; the parameter's own storage is freed.
    """
    import deepspeed

    with without_shared_memory_op():
        init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config, mem_efficient_linear=False)
    return lambda parameter: init._convert_to_zero_parameters([parameter])

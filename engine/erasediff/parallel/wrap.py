"""Model and optimizer wrapping for distributed training: DDP, FSDP2 and DeepSpeed ZeRO."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from erasediff.config import DistributedConfig, check_offload
from erasediff.errors import UserError
from erasediff.io.tensor_file import LazyWeights
from erasediff.parallel.control_plane import ControlPlane
from erasediff.parallel.fsdp import reset_after_failure
from erasediff.parallel.zero.config import cuts_parameters, zero_config
from erasediff.parallel.zero.engine import check_engine, without_shared_memory_op
from erasediff.parallel.zero.partition import gather_in_forward, partition

O = TypeVar("O", bound=torch.optim.Optimizer)  # noqa: E741
MakeOptimizer = Callable[[Iterable[nn.Parameter]], O]


def parallelize_network(
    network: nn.Module,
    parameters: Iterable[nn.Parameter],
    make_optimizer: MakeOptimizer[O],
    settings: DistributedConfig,
    *,
    batch_size: int,
    accumulation_steps: int,
    max_grad_norm: float | None,
    weights: LazyWeights | None = None,
    autocast: torch.dtype | None = None,
) -> tuple[nn.Module, O]:
    """Wrap ``network`` as ``settings`` say, and make its optimizer.

    The network is sharded in place: its parameters are no longer whole under FSDP and ZeRO-3.

    Args:
        network: The user's own module.
        parameters: Those of ``network`` that are trained; all others require no gradient.
        make_optimizer: Called with the parameters as they are once the network is wrapped.
        settings: How ranks share the work.
        batch_size: Of all ranks together.
        accumulation_steps: Micro-batches into which each rank cuts its part of a batch.
        max_grad_norm: Largest norm of the update's direction; None for no clipping.
        weights: Of a network whose parameters are on the meta device: the main rank reads them one by one.
        autocast: dtype of the forward passes, None for none. FSDP gathers weights in it and reduces in float32; DDP
            and ZeRO communicate in the weights' own dtype.

    Returns:
        The module to train, ``network`` or what holds it now, and the optimizer.

    Raises:
        UserError: Settings that do not go together, or DeepSpeed is needed and not installed.
    """
    check_offload(settings)
    if settings.launch == "none":
        return network, make_optimizer(parameters)
    if settings.launch == "ddp":
        device = next(network.parameters()).device
        optimizer = make_optimizer(parameters)
        return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None), optimizer
    if settings.launch == "fsdp":
        shard(network, settings, autocast)
        return network, make_optimizer([p for p in network.parameters() if p.requires_grad])
    config = zero_config(
        settings,
        batch_size=batch_size,
        processes=ControlPlane.current().size,
        accumulation_steps=accumulation_steps,
        max_grad_norm=max_grad_norm,
        bf16=any(parameter.dtype == torch.bfloat16 for parameter in network.parameters()),
    )
    _check_config(config, settings)
    if any(parameter.is_meta for parameter in network.parameters()):
        assert weights is not None
        names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        partition(network, partial(_read, weights), config)
        parameters = [network.get_parameter(name) for name in names]
    optimizer = make_optimizer(parameters)
    return _engine(network, optimizer, config, settings), optimizer


def parallelize_frozen(
    teacher: nn.Module,
    settings: DistributedConfig,
    weights: LazyWeights | None,
    autocast: torch.dtype | None = None,
) -> nn.Module:
    """Shard a frozen copy of the network where the network itself will be sharded (FSDP, ZeRO-3).

    Args:
        teacher: The copy; sharded in place.
        settings: How ranks share the work.
        weights: As in ``parallelize_network``.
        autocast: As in ``parallelize_network``.

    Returns:
        ``teacher``.
    """
    if settings.launch == "fsdp":
        shard(teacher, settings, autocast)
        # After a pass that raised nothing else would tell torch that it is over.
        teacher.register_forward_hook(_reset_if_failed, always_call=True)
    elif cuts_parameters(settings):
        bf16 = any(parameter.dtype == torch.bfloat16 for parameter in teacher.parameters())
        config = zero_config(
            settings,
            batch_size=ControlPlane.current().size,
            processes=ControlPlane.current().size,
            accumulation_steps=1,
            max_grad_norm=None,
            bf16=bf16,
        )
        _check_config(config, settings)
        partition(teacher, partial(_read, weights or {}), config)
        gather_in_forward(teacher)
    return teacher


def _reset_if_failed(teacher: nn.Module, _inputs: Any, output: Any) -> None:
    if output is None:
        reset_after_failure(teacher)


def _read(weights: LazyWeights, name: str) -> Tensor:
    # What a LoRA adapts lies one module deeper, by peft's name for it.
    return weights[name.replace(".base_layer.", ".")]()


def shard(network: nn.Module, settings: DistributedConfig, autocast: torch.dtype | None = None) -> None:
    """Apply FSDP2 to ``network``, unit by unit: one unit's parameters are gathered at a time.

    Args:
        network: Its parameters become distributed tensors of their own dtype.
        settings: Whether parameters rest on the CPU.
        autocast: dtype of the forward passes. Weights are gathered in it, which autocast would cast them to, and
            gradients are reduced in float32. None gathers and reduces in the parameters' own dtype.
    """
    offload_policy = CPUOffloadPolicy() if settings.offload_params else OffloadPolicy()
    # Inputs are autocast's to cast: what it leaves in float32, such as rotary embeddings, must stay so.
    precision = (
        MixedPrecisionPolicy()
        if autocast is None
        else MixedPrecisionPolicy(param_dtype=autocast, reduce_dtype=torch.float32, cast_forward_inputs=False)
    )
    # By default the mesh is one of GPUs wherever there are some, whatever device was asked for.
    mesh = init_device_mesh(next(network.parameters()).device.type, (ControlPlane.current().size,))
    for unit in (*shard_units(network), network):
        fully_shard(unit, mesh=mesh, offload_policy=offload_policy, mp_policy=precision)


def shard_units(network: nn.Module) -> list[nn.Module]:
    """Modules of ``network`` that FSDP2 gathers one by one, inner ones before those that hold them.

    Residual and transformer blocks, by the names that diffusers gives as ``_no_split_modules`` and
    ``_repeated_blocks``, and the network's stages for what is left of each. A unit's parameters are those that no unit
    within it has.
    """
    names = {*(getattr(network, "_no_split_modules", None) or ()), *(getattr(network, "_repeated_blocks", None) or ())}
    stages = [
        stage for child in network.children() for stage in (child if isinstance(child, nn.ModuleList) else [child])
    ]
    candidates = {module for module in network.modules() if type(module).__name__ in names} | set(stages)
    taken: set[nn.Parameter] = set()
    units = []
    # A module comes after what it holds in the reverse of this order.
    for module in reversed(list(network.modules())):
        own = set(module.parameters()) - taken
        if module in candidates and own:
            units.append(module)
            taken |= own
    return units


def _check_config(config: dict[str, Any], settings: DistributedConfig) -> None:
    deepspeed = _import_deepspeed()
    # What it makes of a wrong type is an error of any kind.
    with _refusals_told(settings, Exception):
        deepspeed.DeepSpeedConfig(deepcopy(config))


def _engine(
    network: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], settings: DistributedConfig
) -> nn.Module:
    deepspeed = _import_deepspeed()
    with _refusals_told(settings, AssertionError, ValueError):
        with without_shared_memory_op():
            engine: nn.Module = deepspeed.initialize(model=network, optimizer=optimizer, config=config)[0]
        check_engine(engine)
    return engine


@contextmanager
def _refusals_told(settings: DistributedConfig, *kinds: type[Exception]) -> Iterator[None]:
    """UserError instead of errors of these ``kinds``, if a person's own DeepSpeed configuration may be their reason."""
    try:
        yield
    except kinds as error:
        if settings.deepspeed_config is None:
            raise
        reasons = [str(error)]
        if isinstance(error, ValidationError):
            reasons = [f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}" for wrong in error.errors()]
        sentence = "; ".join(reason.strip().rstrip(".") for reason in reasons)
        raise UserError(f"{settings.deepspeed_config} cannot be used: {sentence}.") from None


def _import_deepspeed() -> Any:
    """DeepSpeed, made quiet. What this changes holds for the whole process: its log level, and one warning's filter."""
    try:
        import deepspeed
    except ImportError:
        raise UserError("--launch zero needs DeepSpeed: install erasediff[zero].") from None
    deepspeed.utils.logger.setLevel("ERROR")
    # Of its own calls, in every forward and backward pass, which no block of ours surrounds.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed

"""A network and its optimizer as the ranks of a run share them."""

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
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from erasediff.config import DistributedConfig, check_offload
from erasediff.errors import UserError
from erasediff.io.tensor_file import LazyWeights
from erasediff.parallel.control_plane import ControlPlane
from erasediff.parallel.zero.config import cuts_parameters, zero_config
from erasediff.parallel.zero.engine import check_engine
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
) -> tuple[nn.Module, O]:
    """What a method is to train, and the optimizer of it: ``network`` itself, or what now stands around it.

    parameters: those of ``network`` that are trained; all others require no gradient
    batch_size: of all ranks together
    weights:    of a network whose parameters are on the meta device: the main rank reads them one by one

    The network is sharded where it is: its parameters are no longer whole under FSDP and ZeRO-3. UserError for settings
    that do not go together, and without DeepSpeed where it is asked for.
    """
    check_offload(settings)
    if settings.launch == "none":
        return network, make_optimizer(parameters)
    if settings.launch == "ddp":
        device = next(network.parameters()).device
        optimizer = make_optimizer(parameters)
        return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None), optimizer
    if settings.launch == "fsdp":
        _shard(network, settings)
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


def parallelize_frozen(teacher: nn.Module, settings: DistributedConfig, weights: LazyWeights | None) -> nn.Module:
    """A frozen copy of the network, spread as the network will be where that is cut into shards (FSDP, ZeRO-3).

    weights: as in ``parallelize_network``
    """
    if settings.launch == "fsdp":
        _shard(teacher, settings)
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


def _read(weights: LazyWeights, name: str) -> Tensor:
    # What a LoRA adapts lies one module deeper, by peft's name for it.
    return weights[name.replace(".base_layer.", ".")]()


def _shard(network: nn.Module, settings: DistributedConfig) -> None:
    """FSDP2, block by block: one block's parameters are whole at a time."""
    policy = CPUOffloadPolicy() if settings.offload_params else OffloadPolicy()
    # By default the mesh is one of GPUs wherever there are some, whatever device was asked for.
    mesh = init_device_mesh(next(network.parameters()).device.type, (ControlPlane.current().size,))
    for child in network.children():
        for block in child if isinstance(child, nn.ModuleList) else [child]:
            if any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh, offload_policy=policy)
    fully_shard(network, mesh=mesh, offload_policy=policy)


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
    try:
        import deepspeed
    except ImportError:
        raise UserError("--launch zero needs DeepSpeed: install erasediff[zero].") from None
    deepspeed.utils.logger.setLevel("ERROR")
    # Shared memory for the ranks of a CPU, compiled for minutes when first used; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Its own calls, at every step; nobody here can mend them.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed

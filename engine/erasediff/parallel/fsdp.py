"""Gradients that FSDP2 (``torch.distributed.fsdp.fully_shard``) leaves in the shards of distributed tensors."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from erasediff.parallel.recovery import agree_to_retry
from erasediff.parallel.replicated import LocalGradientStore
from erasediff.parallel.unwrap import unwrapped
from erasediff.parallel.world import World


class FSDPGradientStore(LocalGradientStore):
    """``GradientStore`` of a model after ``fully_shard``: each process sees and updates its shard of each parameter.

    Raises ``ValueError`` for parameters that are no distributed tensors, that are sharded in another dimension than the
    first, or whose mesh leaves out processes.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(model, optimizer, World.current())
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if not isinstance(parameter, DTensor):
                raise ValueError(f"{name} is not sharded but others are: apply fully_shard to the whole model")
            if any(placement not in (Shard(0), Replicate()) for placement in parameter.placements):
                raise ValueError(f"{name} is placed as {parameter.placements}: shard in the first dimension")
            if parameter.device_mesh.size() != self.world.size:
                raise ValueError(
                    f"{name} is on {parameter.device_mesh.size()} of {self.world.size} processes: give fully_shard a "
                    "mesh of all"
                )
        first = cast(DTensor, self.parameters[0])
        self._replicas = 1
        for placement, size in zip(first.placements, first.device_mesh.shape, strict=True):
            if placement.is_replicate():
                self._replicas *= size
        # With parameters offloaded, the gradients' device is not the one that computes.
        if first.device_mesh.device_type != "cpu":
            self.device = self.world.device

    @property
    def replicated(self) -> bool:
        return self._replicas == self.world.size

    @property
    def replicas(self) -> int:
        return self._replicas

    def _recover(self) -> None:
        agree_to_retry(self.world)
        reset_after_failure(self.model)

    def refresh(self) -> None:
        super().refresh()
        if self._is_open:
            # After a failure modules do not reshard; whether all ranks failed is asked when the next gradient begins.
            reset_after_failure(self.model)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                # A forward pass without a backward leaves the root's weights gathered, and now out of date.
                module.reshard()

    def _here(self, tensor: Tensor) -> Tensor:
        return cast(DTensor, tensor).to_local()

    def _as_gradient(self, delta: Tensor, parameter: nn.Parameter) -> Tensor:
        whole = cast(DTensor, parameter)
        return DTensor.from_local(
            delta, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )

    def _start(self, parameter: nn.Parameter) -> int:
        whole = cast(DTensor, parameter)
        row = 0
        length = whole.shape[0] if whole.ndim else 1
        for dimension, placement in enumerate(whole.placements):
            if placement.is_shard():
                size = whole.device_mesh.size(dimension)
                chunk = -(-length // size)
                first = min(chunk * whole.device_mesh.get_local_rank(dimension), length)
                row, length = row + first, min(chunk, length - first)
        return row * (whole[0].numel() if whole.ndim and whole.shape[0] else 1)


def reset_after_failure(model: nn.Module) -> None:
    """Reshard ``model``, after ``fully_shard``, and forget the forward or backward pass that raised.

    Raises:
        RuntimeError: The installed torch has no ``FSDPModule.reset_iter_state``.
    """
    root: Any = unwrapped(model)
    if not hasattr(root, "reset_iter_state"):
        raise RuntimeError(f"torch {torch.__version__} cannot go on after a failed FSDP2 step: resume in a new process")
    root.reset_iter_state()
    for module in root.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for parameter in group.fsdp_params:
                    # Of micro-batches whose gradients were not reduced, which torch keeps.
                    parameter.unsharded_accumulated_grad = None
                    if hasattr(parameter, "_unsharded_param"):
                        parameter._unsharded_param.grad = None

"""Gradients in ``Parameter.grad`` of one process, updated by the fused optimizers or by any other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from erasediff_kernels import ConstrainedAdamW, ConstrainedSGD, Constraint, gradient_gram


class LocalGradients:
    """``Gradients`` of the parameters that ``optimizer`` updates.

    ``ConstrainedAdamW`` and ``ConstrainedSGD`` read both gradients in one pass. For any other optimizer the combination
    is formed in the retain gradients' own storage; a non-finite step is then skipped on the device where the optimizer
    can (``fused=True``), and by reading one flag on the host where it cannot.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.parameters: list[Tensor] = [
            parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.requires_grad
        ]
        if not self.parameters:
            raise ValueError("the optimizer holds no parameter that requires a gradient")

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    def take(self) -> list[Tensor]:
        taken = []
        for parameter in self.parameters:
            # A parameter that this loss does not reach has gradient zero.
            taken.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
            parameter.grad = None
        return taken

    def gram(self, retain: list[Tensor], forget: list[Tensor]) -> Tensor:
        masks = [self.optimizer.state[parameter].get("mask") for parameter in self.parameters]
        if all(mask is None for mask in masks):
            return gradient_gram(retain, forget)
        # Elements that a bit mask freezes have no part in the step, so none in its multiplier or norm.
        whole = [index for index, mask in enumerate(masks) if mask is None]
        masked = [index for index, mask in enumerate(masks) if mask is not None]
        values = torch.zeros(3, dtype=torch.float64, device=retain[0].device)
        for part in filter(None, (whole, masked)):
            r, g = ([gradients[index] for index in part] if gradients else [] for gradients in (retain, forget))
            values = values + gradient_gram(r, g, [masks[index] for index in part] if part is masked else ())
        return values

    def update(self, retain: list[Tensor], forget: list[Tensor], constraint: Constraint) -> None:
        if isinstance(self.optimizer, (ConstrainedAdamW, ConstrainedSGD)):
            self.optimizer.constrained_step(retain, forget, constraint)
            return
        if forget:
            torch._foreach_mul_(forget, constraint.multiplier)
            torch._foreach_add_(retain, forget)
        torch._foreach_mul_(retain, constraint.clip_scale)
        for parameter, delta in zip(self.parameters, retain, strict=True):
            parameter.grad = delta
        self._step_unless_non_finite(self.optimizer, constraint.finite)
        for parameter in self.parameters:
            parameter.grad = None

    @staticmethod
    def _step_unless_non_finite(optimizer: Any, finite: Tensor) -> None:
        if all(group.get("fused") for group in optimizer.param_groups):
            # The contract between GradScaler and fused optimizers.
            optimizer.grad_scale = None
            optimizer.found_inf = (~finite).float()
            try:
                optimizer.step()
            finally:
                del optimizer.grad_scale, optimizer.found_inf
        elif bool(finite):
            optimizer.step()

"""Hooks on a block of a diffusers network: its output and the timestep of the call."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from erasediff.errors import UserError

ATTENTION_BLOCK = re.compile(r"(.*\.)?attentions\.\d+|(single_)?transformer_blocks\.\d+")


def denoiser_of(pipeline: Any) -> nn.Module:
    """Denoising network of a diffusers pipeline, or the network itself."""
    if isinstance(pipeline, nn.Module):
        return pipeline
    for name in ("unet", "transformer"):
        network = getattr(pipeline, name, None)
        if isinstance(network, nn.Module):
            return network
    raise ValueError(f"{type(pipeline).__name__} has neither a unet nor a transformer: give the network itself")


def block_of(network: nn.Module, name: str) -> nn.Module:
    """Find the block ``name``. UserError if the network lacks it, with the names of its attention blocks."""
    try:
        return network.get_submodule(name)
    except AttributeError:
        known = [module for module, _ in network.named_modules() if ATTENTION_BLOCK.fullmatch(module)]
        raise UserError(f"The network has no block {name}: set saemnesia.block to one of {', '.join(known)}.") from None


def at_block(network: nn.Module, name: str, visit: Callable[[Tensor, Tensor], Tensor | None]) -> ExitStack:
    """Call ``visit(x, timestep)`` with each output of a block; what it returns takes its place.

    x is [B, C, h, w] or [B, patches, C]; the timestep is the one that the network was called with, so neither the
    scheduler, nor its order, nor the number of calls matters. It lasts for a with statement, or until ``close`` is
    called on what is returned, whether or not that is kept.
    """
    seen: dict[str, Tensor] = {}

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["timestep"] = kwargs["timestep"] if "timestep" in kwargs else args[1]

    def pass_on(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        plain = isinstance(output, Tensor)
        x = output if plain else output[0]
        changed = visit(x, seen["timestep"])
        if changed is None:
            return output
        return changed if plain else (changed, *output[1:])

    block = block_of(network, name)
    stack = ExitStack()
    stack.callback(network.register_forward_pre_hook(remember, with_kwargs=True).remove)
    stack.callback(block.register_forward_hook(pass_on).remove)
    return stack


def as_patches(x: Tensor) -> Tensor:
    """[B, C, h, w] or [B, patches, C] as [B, patches, C]; maps need not be square."""
    return x.flatten(2).transpose(1, 2) if x.dim() == 4 else x


def as_before(patches: Tensor, like: Tensor) -> Tensor:
    """Reshape patches to the block's output: the inverse of ``as_patches``."""
    return patches.transpose(1, 2).reshape(like.shape) if like.dim() == 4 else patches

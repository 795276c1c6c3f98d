"""What a block of a diffusers network gives out, and at which timestep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from erasediff.errors import UserError


def denoiser_of(pipeline: Any) -> nn.Module:
    """The denoising network of a diffusers pipeline; a network is its own."""
    if isinstance(pipeline, nn.Module):
        return pipeline
    for name in ("unet", "transformer"):
        network = getattr(pipeline, name, None)
        if isinstance(network, nn.Module):
            return network
    raise ValueError(f"{type(pipeline).__name__} has neither a unet nor a transformer: give the network itself")


def block_of(network: nn.Module, name: str) -> nn.Module:
    """The block called ``name``. UserError for a network without it."""
    try:
        return network.get_submodule(name)
    except AttributeError:
        raise UserError(f"The network has no block {name}: name one of its attention blocks.") from None


@contextmanager
def at_block(network: nn.Module, name: str, visit: Callable[[Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    """Call ``visit(x, timestep)`` with each output of a block; what it returns takes its place.

    x is [B, C, h, w] or [B, patches, C]; the timestep is the one that the network was called with, so neither the
    scheduler, nor its order, nor the number of calls matters.
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

    handles = [
        network.register_forward_pre_hook(remember, with_kwargs=True),
        block_of(network, name).register_forward_hook(pass_on),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def as_patches(x: Tensor) -> Tensor:
    """[B, C, h, w] or [B, patches, C] as [B, patches, C]; maps need not be square."""
    return x.flatten(2).transpose(1, 2) if x.dim() == 4 else x


def as_before(patches: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``as_patches``."""
    return patches.transpose(1, 2).reshape(like.shape) if like.dim() == 4 else patches

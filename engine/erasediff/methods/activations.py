"""What layers see and say: per sample, the mean square of every input and the mean magnitude of every neuron."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def recorded_inputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Within the block, each forward pass leaves float32 [B, inputs] by layer: E x^2 over a sample's positions."""
    inputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, layer in layers.items():

            def record(module: nn.Module, given: Any, name: str = name) -> None:
                inputs[name] = _channels_last(module, given[0]).square().mean(1)

            stack.callback(layer.register_forward_pre_hook(record).remove)
        yield inputs


@contextmanager
def recorded_outputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Within the block, each forward pass leaves float32 [B, neurons] by layer: E |z| over a sample's positions."""
    outputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, layer in layers.items():

            def record(module: nn.Module, _: Any, output: Tensor, name: str = name) -> None:
                outputs[name] = _channels_last(module, output).abs().mean(1)

            stack.callback(layer.register_forward_hook(record).remove)
        yield outputs


def _channels_last(layer: nn.Module, value: Tensor) -> Tensor:
    """float32 [B, positions, channels]."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        value = value.movedim(1, -1)
    return value.detach().float().reshape(value.shape[0], -1, value.shape[-1])

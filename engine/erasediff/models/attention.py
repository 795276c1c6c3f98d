"""Attention backends: diffusers' dispatcher, with a backend that was probed on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0
from torch import Tensor, nn

from erasediff.errors import UserError

BACKENDS = ("flash", "xformers", "native")
"""Backends in the order in which "auto" tries them."""
PACKAGES = {"flash": "flash_attn", "xformers": "xformers"}
"""Packages that diffusers calls for a backend, also where they are not installed."""
PROBE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """Chosen attention backend.

    Attributes:
        backend: One of ``BACKENDS``.
        refused: Reasons of the backends that were tried before it and cannot run.
    """

    backend: str
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        reasons = "; ".join(f"{backend} cannot run: {reason}" for backend, reason in self.refused.items())
        return f"{self.backend} ({reasons})" if reasons else self.backend


def set_attention(
    module: nn.Module,
    choice: str = "auto",
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> AttentionChoice:
    """Set the attention backend of a denoiser, probed forward and backward with each of its head sizes.

    Args:
        module: The denoiser.
        choice: "native" (torch), "xformers", "flash" (flash-attn), or "auto" for the first that runs.
        dtype: Dtype of autocast if it is used; None for the weights' own.
        device: Device to probe on; None for the weights' own.

    Raises:
        UserError: The choice cannot run here, or the denoiser has attention that takes no backend.
    """
    if choice not in ("auto", *BACKENDS):
        raise UserError(f"There is no attention {choice!r}: give auto, {', '.join(BACKENDS)}.")
    weight = next(module.parameters())
    device = device or weight.device
    _check_processors(module)
    heads = sorted({(attention.heads, attention.inner_dim // attention.heads) for attention in _attentions(module)})
    refused: dict[str, str] = {}
    for backend in BACKENDS if choice == "auto" else (choice,):
        reason = _probe(backend, heads, device, dtype or weight.dtype)
        if reason is None:
            use_backend(module, backend)
            return AttentionChoice(backend, refused)
        refused[backend] = reason
    tried = "; ".join(f"{backend}: {reason}" for backend, reason in refused.items())
    raise UserError(f"Attention cannot run this way on {device}: {tried}.")


def use_backend(module: nn.Module, backend: str) -> None:
    """Set the attention backend of a denoiser without a probe.

    diffusers' own ``set_attention_backend`` ignores UNets and SD3, whose processors call torch directly, and changes
    what every other model in the process uses.

    Raises:
        UserError: The denoiser has attention that takes no backend.
    """
    _check_processors(module)
    for attention in _attentions(module):
        if type(attention.processor) in DISPATCHED:
            attention.set_processor(DISPATCHED[type(attention.processor)]())
        attention.processor._attention_backend = AttentionBackendName(backend)


def _check_processors(module: nn.Module) -> None:
    """Raise UserError for a processor that would ignore a backend: the others have the class attribute."""
    for attention in _attentions(module):
        cls = type(attention.processor)
        if cls not in DISPATCHED and not hasattr(cls, "_attention_backend"):
            raise UserError(
                f"The attention of this model runs by {cls.__name__}, which takes no backend: set the processor of "
                "diffusers' own model, or leave the attention as it is."
            )


def _attentions(module: nn.Module) -> Iterator[Any]:
    for part in module.modules():
        if hasattr(part, "processor") and hasattr(part, "heads"):
            yield part


def _probe(backend: str, heads: list[tuple[int, int]], device: torch.device, dtype: torch.dtype) -> str | None:
    """Reason why the backend cannot run; None if it can."""
    try:
        for count, size in heads:
            inputs = [
                torch.ones(1, PROBE_TOKENS, count, size, device=device, dtype=dtype, requires_grad=True) for _ in "qkv"
            ]
            output = dispatch_attention_fn(*inputs, backend=AttentionBackendName(backend))
            output.sum().backward()
            if not bool(output.isfinite().all()):
                return "its result is not finite"
    except (ImportError, RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, KeyError) as error:
        package = PACKAGES.get(backend)
        if isinstance(error, TypeError | AttributeError) and package is not None and find_spec(package) is None:
            return f"{package} is not installed"
        return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
    return None


class DispatchedAttention:
    """diffusers' ``AttnProcessor2_0`` of a UNet's transformer block, computed through the dispatcher."""

    _attention_backend: AttentionBackendName | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = _projected(attn, hidden_states, context)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], hidden_states.shape[0])
            attention_mask = attention_mask.unflatten(0, (hidden_states.shape[0], attn.heads))
        mixed = dispatch_attention_fn(query, key, value, attn_mask=attention_mask, backend=self._attention_backend)
        return _out(attn, mixed.flatten(2).to(query.dtype))


class DispatchedJointAttention:
    """diffusers' ``JointAttnProcessor2_0`` (SD3: image and text tokens attend jointly) through the dispatcher."""

    _attention_backend: AttentionBackendName | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        query, key, value = _projected(attn, hidden_states, hidden_states)
        if encoder_hidden_states is not None:
            text = [
                projection(encoder_hidden_states).unflatten(-1, (attn.heads, -1))
                for projection in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            ]
            text[0] = text[0] if attn.norm_added_q is None else attn.norm_added_q(text[0])
            text[1] = text[1] if attn.norm_added_k is None else attn.norm_added_k(text[1])
            query, key, value = (torch.cat(pair, dim=1) for pair in zip((query, key, value), text, strict=True))
        mixed = dispatch_attention_fn(query, key, value, backend=self._attention_backend).flatten(2).to(query.dtype)
        if encoder_hidden_states is None:
            return _out(attn, mixed)
        image, words = mixed.split((hidden_states.shape[1], encoder_hidden_states.shape[1]), dim=1)
        return _out(attn, image), words if attn.context_pre_only else attn.to_add_out(words)


def _projected(attn: Any, hidden_states: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query [B, tokens, heads, size], key and value, the layout of the dispatcher."""
    query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
    key = attn.to_k(context).unflatten(-1, (attn.heads, -1))
    value = attn.to_v(context).unflatten(-1, (attn.heads, -1))
    query = query if attn.norm_q is None else attn.norm_q(query)
    key = key if attn.norm_k is None else attn.norm_k(key)
    return query, key, value


def _out(attn: Any, mixed: Tensor) -> Tensor:
    projection, dropout = attn.to_out
    result: Tensor = dropout(projection(mixed))
    return result


DISPATCHED = {AttnProcessor2_0: DispatchedAttention, JointAttnProcessor2_0: DispatchedJointAttention}
"""Replacements of diffusers' processors that call torch directly."""

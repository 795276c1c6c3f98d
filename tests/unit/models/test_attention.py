"""Attention through the dispatcher computes the same, and a backend that cannot run is refused with its reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from nano import FAMILY_EXAMPLES
from torch import Tensor
from torch.overrides import TorchFunctionMode

from erasediff.errors import UserError
from erasediff.models import attention
from erasediff.models.attention import set_attention, use_backend
from erasediff.models.load import load_text_to_image

pytestmark = pytest.mark.usefixtures("one_thread")
Folder = Callable[[str], Path]


def inputs(model: Any, size: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    latents = torch.randn(2, *model.latent_shape(size, size), generator=torch.Generator().manual_seed(0))
    condition = model.encode_prompts(["a cat", "b"]) | model.size_condition((size, size), (0, 0), (size, size), 2)
    return latents, model.process.conditioning[torch.tensor([10, 900])], condition


class Counted(TorchFunctionMode):
    """Counts the calls of torch's own attention."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is torch.nn.functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FAMILY_EXAMPLES)
def test_dispatched_attention_predicts_the_same(
    name: str, nano: Any, nano_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = load_text_to_image(nano_folder(name))
    given = inputs(model, nano.SIZE)
    with Counted() as counted:
        expected = model.predict(model.denoiser, *given)
    backends: list[Any] = []

    def dispatch(*args: Any, backend: Any, **kwargs: Any) -> Tensor:
        backends.append(backend)
        result: Tensor = dispatch_attention_fn(*args, backend=backend, **kwargs)
        return result

    monkeypatch.setattr(attention, "dispatch_attention_fn", dispatch)
    monkeypatch.setattr("diffusers.models.transformers.transformer_flux.dispatch_attention_fn", dispatch)
    use_backend(model.denoiser, "_native_math")
    torch.testing.assert_close(model.predict(model.denoiser, *given), expected, rtol=1e-4, atol=1e-5)
    assert counted.calls == len(backends) > 0
    assert set(backends) == {AttentionBackendName._NATIVE_MATH}


def test_auto_says_what_it_took_and_why_not_the_others(nano: Any, nano_folder: Folder) -> None:
    model: Any = load_text_to_image(nano_folder("sd"))
    given = inputs(model, nano.SIZE)
    expected = model.predict(model.denoiser, *given)
    choice = set_attention(model.denoiser, "auto")
    assert choice.backend == "native"
    assert list(choice.refused) == ["flash", "xformers"]
    assert all(choice.refused.values())
    assert not any("NoneType" in reason for reason in choice.refused.values())
    assert str(choice).startswith("native (flash cannot run: ")
    assert "; xformers cannot run: " in str(choice)
    assert str(attention.AttentionChoice("flash")) == "flash"
    assert torch.equal(model.predict(model.denoiser, *given), expected)


@pytest.mark.parametrize("choice", ["flash", "xformers"])
def test_choice_that_cannot_run_is_an_error(choice: str, nano: Any) -> None:
    module = nano.sd().unet
    with pytest.raises(UserError, match=f"cannot run this way on cpu: {choice}: "):
        set_attention(module, choice)
    assert set_attention(module, "native").backend == "native"


def test_processor_that_ignores_a_backend_is_told(nano: Any) -> None:
    module = nano.sd().unet
    layer = next(part for part in module.modules() if hasattr(part, "processor"))
    layer.set_processor(AttnProcessor())
    for chosen in (lambda: set_attention(module, "native"), lambda: use_backend(module, "native")):
        with pytest.raises(UserError, match="runs by AttnProcessor, which takes no backend"):
            chosen()
    # Nothing is set by half.
    processors = [part.processor for part in module.modules() if hasattr(part, "processor")]
    assert not any("_attention_backend" in vars(processor) for processor in processors)
    layer.set_processor(AttnProcessor2_0())
    assert set_attention(module, "native").backend == "native"


def test_unknown_choice(nano: Any) -> None:
    with pytest.raises(UserError, match="no attention 'fast': give auto, flash, xformers, native"):
        set_attention(nano.sd().unet, "fast")


class Untrainable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor) -> Tensor:
        return query.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("there is no backward.")


def test_probe_trains_with_the_models_own_head_sizes(nano: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[int, ...]] = set()

    def dispatch(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        seen.add((*query.shape[2:], query.dtype))
        result: Tensor = Untrainable.apply(query)
        return result

    monkeypatch.setattr(attention, "dispatch_attention_fn", dispatch)
    with pytest.raises(UserError, match="flash: there is no backward"):
        set_attention(nano.flux().transformer, "flash", dtype=torch.bfloat16)
    assert seen == {(2, 16, torch.bfloat16)}

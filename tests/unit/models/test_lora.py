"""LoRA: trained, merged, and read by diffusers in both kinds of keys; one for another model is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from nano import FAMILY_EXAMPLES
from safetensors.torch import load_file, save_file
from torch import Tensor

from erasediff import EraseDiff
from erasediff.errors import UserError
from erasediff.models import lora
from erasediff.models.load import load_text_to_image
from erasediff.models.trainable import select
from erasediff_kernels import ConstrainedAdamW

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = FAMILY_EXAMPLES
KOHYA = ["sd", "sd_v_prediction", "sdxl"]
Folder = Callable[[str], Path]


def inputs(model: Any, size: int) -> dict[str, Tensor]:
    latents = torch.randn(2, *model.latent_shape(size, size), generator=torch.Generator().manual_seed(0))
    condition = model.encode_prompts(["a cat", "b"])
    return {"sample": latents, **condition, **model.size_condition((size, size), (0, 0), (size, size), 2)}


def predicted(model: Any, size: int, module: Any = None) -> Tensor:
    data = inputs(model, size)
    with torch.no_grad():
        timesteps = model.process.conditioning[torch.tensor([10, 900])]
        result: Tensor = model.predict(module or model.denoiser, data["sample"], timesteps, data)
    return result


def trained(folder: Path, size: int, *, targets: str = "xattn", rank: int = 4, alpha: float | None = None) -> Any:
    model: Any = load_text_to_image(folder)
    module = model.denoiser
    before = predicted(model, size)
    parameters = lora.add(module, rank=rank, alpha=alpha, targets=select(module, targets))
    assert torch.equal(predicted(model, size), before)
    assert [p for p in module.parameters() if p.requires_grad] == parameters
    optimizer = ConstrainedAdamW(parameters, lr=1e-2)
    unlearner = EraseDiff(module, optimizer, process=model.process, denoiser=model.predict)
    for _ in range(3):
        assert unlearner.step(inputs(model, size), inputs(model, size)).finite
    assert not torch.allclose(predicted(model, size), before)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_loads_what_was_trained(name: str, nano: Any, nano_folder: Folder, tmp_path: Path) -> None:
    model = trained(nano_folder(name), nano.SIZE, alpha=6.0)
    expected = predicted(model, nano.SIZE)
    lora.save(model.denoiser, tmp_path / "lora.safetensors", family=model.family)
    theirs = DiffusionPipeline.from_pretrained(nano_folder(name))
    theirs.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    module = getattr(theirs, model.denoiser_component)
    torch.testing.assert_close(predicted(model, nano.SIZE, module), expected, rtol=1e-5, atol=1e-6)

    again: Any = load_text_to_image(nano_folder(name))
    lora.load(again.denoiser, tmp_path / "lora.safetensors", family=again.family)
    torch.testing.assert_close(predicted(again, nano.SIZE), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", KOHYA)
def test_kohya_keys_are_read_here_and_by_diffusers(name: str, nano: Any, nano_folder: Folder, tmp_path: Path) -> None:
    model = trained(nano_folder(name), nano.SIZE, alpha=2.0)
    expected = predicted(model, nano.SIZE)
    lora.save(model.denoiser, tmp_path / "lora.safetensors", family=model.family, keys="kohya")
    tensors = load_file(tmp_path / "lora.safetensors")
    block = "input_blocks_3_1" if name == "sdxl" else "down_blocks_0_attentions_0"
    assert f"lora_unet_{block}_transformer_blocks_0_attn2_to_k.lora_down.weight" in tensors
    assert {float(value) for key, value in tensors.items() if key.endswith(".alpha")} == {2.0}
    again: Any = load_text_to_image(nano_folder(name))
    lora.load(again.denoiser, tmp_path / "lora.safetensors", family=again.family)
    torch.testing.assert_close(predicted(again, nano.SIZE), expected, rtol=1e-5, atol=1e-6)
    theirs = DiffusionPipeline.from_pretrained(nano_folder(name))
    theirs.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    torch.testing.assert_close(predicted(model, nano.SIZE, theirs.unet), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "targets"), [*((name, "xattn") for name in FAMILIES), ("sd", "full")])
def test_merged_model_is_an_ordinary_checkpoint(
    name: str, targets: str, nano: Any, nano_folder: Folder, tmp_path: Path
) -> None:
    """Convolutions included; only the adapted layers' weights differ from the input's."""
    model = trained(nano_folder(name), nano.SIZE, targets=targets, rank=2)
    expected = predicted(model, nano.SIZE)
    with pytest.raises(ValueError, match="merge its LoRA"):
        model.save(tmp_path / "early")
    lora.merge(model.denoiser)
    torch.testing.assert_close(predicted(model, nano.SIZE), expected, rtol=1e-4, atol=1e-5)
    model.save(tmp_path / "out")
    theirs = DiffusionPipeline.from_pretrained(tmp_path / "out")
    module = getattr(theirs, model.denoiser_component)
    assert torch.equal(predicted(model, nano.SIZE, module), predicted(model, nano.SIZE))
    base: Any = load_text_to_image(nano_folder(name))
    names = set(select(base.denoiser, targets))
    for key, value in base.denoiser.state_dict().items():
        assert key in names or torch.equal(value, module.state_dict()[key])


def test_first_values_depend_on_the_seed_alone(nano: Any) -> None:
    modules = [nano.sd().unet for _ in range(3)]
    state = torch.get_rng_state()
    first, again, other = (
        lora.add(module, rank=2, targets=select(module, "xattn"), seed=seed)
        for module, seed in zip(modules, (1, 1, 2), strict=True)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


def test_adapters_of_half_precision_weights_are_float32(nano: Any, nano_folder: Folder) -> None:
    model: Any = load_text_to_image(nano_folder("sd"), dtype=torch.bfloat16)
    parameters = lora.add(model.denoiser, rank=2, targets=select(model.denoiser, "xattn"))
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert predicted(model, nano.SIZE).dtype == torch.bfloat16


def test_what_cannot_be_added(nano: Any) -> None:
    module = nano.sd().unet
    with pytest.raises(UserError, match="at least 1, not 0"):
        lora.add(module, rank=0, targets=select(module, "xattn"))
    with pytest.raises(UserError, match="no linear or convolutional layer"):
        lora.add(module, rank=2, targets=select(module, "re:norm"))
    lora.add(module, rank=2, targets=select(module, "xattn"))
    with pytest.raises(ValueError, match="has a LoRA already"):
        lora.add(module, rank=2, targets=select(module, "xattn"))
    with pytest.raises(ValueError, match="no LoRA to save"):
        lora.save(nano.sd().unet, Path("x"), family="sd")


@pytest.mark.parametrize(("source", "target"), [("sd", "sdxl"), ("sdxl", "sd"), ("sd", "flux"), ("sd3", "flux")])
def test_lora_of_another_family_is_refused(
    source: str, target: str, nano: Any, nano_folder: Folder, tmp_path: Path
) -> None:
    model = trained(nano_folder(source), nano.SIZE)
    lora.save(model.denoiser, tmp_path / "lora.safetensors", family=model.family)
    other: Any = load_text_to_image(nano_folder(target))
    with pytest.raises(UserError, match="LoRA for another model"):
        lora.load(other.denoiser, tmp_path / "lora.safetensors", family=other.family)
    assert not any("lora" in name for name, _ in other.denoiser.named_parameters())


def test_damaged_lora_files(nano: Any, tmp_path: Path) -> None:
    module = nano.sd().unet
    path = tmp_path / "x.safetensors"
    layer = "unet.mid_block.attentions.0.proj_in"
    down, up = torch.zeros(2, 32, 1, 1), torch.zeros(32, 2, 1, 1)
    for tensors, match in (
        ({"a": torch.zeros(1)}, "is not a LoRA"),
        ({f"{layer}.lora_A.weight": down}, "lacks the other half"),
        ({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up[:, :1].clone()}, "lacks the other half"),
        ({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up[:5].clone()}, "of another size"),
        ({"lora_te_text_model_x.lora_down.weight": down}, "also adapts text encoders"),
    ):
        save_file(tensors, path)
        with pytest.raises(UserError, match=match):
            lora.load(module, path, family="sd")
    for name, match in (("x.pt", "pickle"), ("nowhere.safetensors", "cannot be read")):
        with pytest.raises(UserError, match=match):
            lora.load(module, tmp_path / name, family="sd")


def test_families_without_kohya_keys_say_so(nano: Any, nano_folder: Folder, tmp_path: Path) -> None:
    model = trained(nano_folder("flux"), nano.SIZE)
    with pytest.raises(UserError, match="no kohya keys here"):
        lora.save(model.denoiser, tmp_path / "x.safetensors", family="flux", keys="kohya")
    assert list(tmp_path.iterdir()) == []
    assert math.isfinite(float(predicted(model, nano.SIZE).sum()))

"""What was trained is saved in the dtype asked for, or in the narrowest that keeps the update; nothing else changes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import folder_weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from erasediff.errors import RunFailedError
from erasediff.models.load import load_text_to_image
from erasediff.models.weight_update import WeightUpdate, host_copy, measure_update

pytestmark = pytest.mark.usefixtures("one_thread")
Folder = Callable[[str], Path]
FILE = "unet/diffusion_pytorch_model.safetensors"
TRAINED = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
FP8 = torch.float8_e4m3fn


def measured(first: Tensor, update: Tensor, stored: torch.dtype, dtype: Any = None) -> WeightUpdate:
    return measure_update({"w": lambda: first}, {"w": first + update}, {"w": stored}, dtype)


def rounded(dtype: torch.dtype) -> Tensor:
    """Weights of a checkpoint of this dtype, as they are in memory."""
    return (0.05 * torch.randn(400, 1000, generator=torch.Generator().manual_seed(0))).to(dtype).float()


def signs(size: float) -> Tensor:
    return size * torch.randn(400, 1000, generator=torch.Generator().manual_seed(1)).sign()


def test_the_update_is_measured_in_memory() -> None:
    first = rounded(torch.float32)
    update = signs(1e-3)
    update[100:] = 0
    found = measured(first, update, torch.float32)
    assert (found.weights, found.changed, found.saved) == (400_000, 100_000, 100_000)
    assert found.relative == pytest.approx(float(update.norm() / first.norm()), rel=1e-3)
    assert found.lost == 0
    assert found.note is None
    assert found.dtypes == {"w": torch.float32}


@pytest.mark.parametrize(
    ("stored", "size", "kept_in"),
    [
        (torch.float32, 1e-7, torch.float32),
        (torch.bfloat16, 2e-4, torch.float32),
        (torch.bfloat16, 1e-2, torch.bfloat16),
        (torch.float16, 1e-3, torch.float16),
        (torch.float16, 1e-5, torch.float32),
        (FP8, 1e-2, torch.bfloat16),
        (FP8, 2e-4, torch.float32),
    ],
    ids=str,
)
def test_the_narrowest_dtype_that_keeps_the_update_is_chosen(
    stored: torch.dtype, size: float, kept_in: torch.dtype
) -> None:
    first, update = rounded(stored), signs(size)
    found = measured(first, update, stored)
    assert found.dtypes == {"w": kept_in}
    value = first + update
    lost = (value.to(kept_in).float() - value).square().sum() / (value - first).square().sum()
    assert found.lost == pytest.approx(float(lost), rel=1e-2, abs=1e-6)
    assert found.lost <= 0.01
    assert (found.note is None) == (kept_in == stored)
    if found.note is not None:
        assert "output.dtype=stored" in found.note


def test_a_dtype_that_was_asked_for_is_taken_and_told_where_it_loses() -> None:
    first, update = rounded(torch.bfloat16), signs(2e-4)
    assert measured(first, update, torch.bfloat16, torch.float32).note is None
    asked = measured(first, update, torch.bfloat16, torch.bfloat16)
    as_stored = measured(first, update, torch.bfloat16, "stored")
    for found in (asked, as_stored):
        assert found.dtypes == {"w": torch.bfloat16}
        assert found.lost > 0.1
        assert found.note is not None
        assert "output.dtype=float32" in found.note


def test_an_update_that_leaves_no_trace_is_no_success() -> None:
    first = rounded(FP8)
    with pytest.raises(RunFailedError, match="No weight of the model changed"):
        measured(first, torch.zeros_like(first), FP8).check()
    with pytest.raises(RunFailedError, match=r"None of the 4.* weights that changed .* output\.dtype"):
        measured(first, signs(1e-7), FP8, "stored").check()
    assert measured(first, signs(1e-7), FP8).check().dtypes == {"w": torch.float32}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    update = signs(1e-3)
    update[3, 3] = value
    with pytest.raises(RunFailedError, match=r"not finite \(w\)"):
        measured(rounded(torch.float32), update, torch.float32)


def test_weights_that_overflow_when_saved_are_refused() -> None:
    update = signs(1e-3)
    update[3, 3] = 1e5
    with pytest.raises(RunFailedError, match="too large for the dtype to save in"):
        measured(rounded(torch.float32), update, torch.float32, torch.float16)


def test_a_copy_on_the_host_stays_as_it_was() -> None:
    network = torch.nn.Linear(3, 2)
    original = host_copy(network, [network.weight])
    assert list(original) == ["weight"]
    with torch.no_grad():
        network.weight.add_(1.0)
    assert measure_update(original, network.state_dict()).changed == 6
    with pytest.raises(RunFailedError):
        measure_update(host_copy(network), network.state_dict()).check()


def stored_in(source: Path, folder: Path, dtype: torch.dtype) -> Path:
    """Copy of a checkpoint, the matrices of its UNet in ``dtype``."""
    shutil.copytree(source, folder)
    weights = load_file(folder / FILE)
    save_file({name: t.to(dtype) if t.ndim > 1 else t for name, t in weights.items()}, folder / FILE)
    return folder


def trained(source: Path, size: float = 2e-4, **options: Any) -> tuple[Any, Tensor]:
    """A model in which one matrix was trained, and its value."""
    model = load_text_to_image(source, **options)
    weight = model.denoiser.get_parameter(TRAINED)
    with torch.no_grad():
        weight += size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).sign()
    return model, weight.detach()


def assert_same_but(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], but: str) -> None:
    assert own.keys() == theirs.keys()
    for name, tensor in own.items():
        if name != but:
            assert tensor.dtype == theirs[name].dtype
            assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, FP8], ids=str)
def test_float32_output_holds_what_was_trained(nano_folder: Folder, tmp_path: Path, dtype: torch.dtype) -> None:
    model, value = trained(stored_in(nano_folder("sd"), tmp_path / "sd", dtype))
    model.save(tmp_path / "out", dtype=torch.float32)
    saved = load_file(tmp_path / "out" / FILE)
    assert torch.equal(saved[TRAINED], value)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.parametrize("layout", ["diffusers", "single-file"])
def test_only_what_changed_is_saved_wider(nano_folder: Folder, tmp_path: Path, layout: Any) -> None:
    source = stored_in(nano_folder("sd"), tmp_path / "sd", torch.bfloat16)
    model, value = trained(source)
    if layout == "single-file":
        model.save(tmp_path / "before.safetensors", layout=layout, dtype="stored")
        model.save(tmp_path / "after.safetensors", layout=layout)
        before, after = (load_file(tmp_path / f"{name}.safetensors") for name in ("before", "after"))
        changed = next(name for name in after if after[name].dtype != before[name].dtype)
        assert torch.equal(after[changed], value)
    else:
        model.save(tmp_path / "out", max_shard_size=50_000)
        before, after, changed = folder_weights(source), folder_weights(tmp_path / "out"), f"unet.{TRAINED}"
        assert torch.equal(after[changed], value)
        # diffusers reads files of several dtypes.
        read = UNet2DConditionModel.from_pretrained(tmp_path / "out/unet")
        assert torch.equal(read.get_parameter(TRAINED), value)
    assert_same_but(after, before, changed)


def test_an_update_that_the_stored_dtype_keeps_is_saved_in_it(nano_folder: Folder, tmp_path: Path) -> None:
    source = stored_in(nano_folder("sd"), tmp_path / "sd", torch.float16)
    model, value = trained(source, size=1e-2)
    model.save(tmp_path / "out")
    after = folder_weights(tmp_path / "out")
    assert torch.equal(after[f"unet.{TRAINED}"], value.half())
    assert_same_but(after, folder_weights(source), f"unet.{TRAINED}")


def test_bfloat16_in_memory_is_saved_as_it_is(nano_folder: Folder, tmp_path: Path) -> None:
    model, value = trained(nano_folder("sd"), size=1e-2, dtype=torch.bfloat16)
    model.save(tmp_path / "out")
    after = folder_weights(tmp_path / "out")
    assert torch.equal(after[f"unet.{TRAINED}"], value.float())
    assert_same_but(after, folder_weights(nano_folder("sd")), f"unet.{TRAINED}")

"""Every file of a checkpoint folder, a single file and a LoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import fuzzed, refusal
from hypothesis import strategies as st
from mutations import BYTES, STRUCTURAL, Change, apply, changes
from seeds import copy_of, make_loras, make_single

from erasediff.models.checkpoint.base import weighted_components
from erasediff.models.checkpoint.components import empty_module
from erasediff.models.checkpoint.opening import open_checkpoint
from erasediff.models.load import load_diffusion_model, load_text_to_image
from erasediff.models.lora_file import read_updates
from erasediff.models.lora_keys import names_in_files
from erasediff.models.stable_diffusion import StableDiffusion
from erasediff.utils.finite import first_not_finite

PARSED = ("sd", "ddpm_class", "ldm", "dit", "sd3")
LOADED = ("ddpm_class", "ldm", "dit", "ddpm_unconditional")


@pytest.fixture(scope="module")
def models(nano_folder: Callable[[str], Path]) -> dict[str, Path]:
    return {name: nano_folder(name) for name in {*PARSED, *LOADED}}


@pytest.fixture(scope="module")
def single(nano_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_single(nano_folder("sd"), tmp_path_factory.mktemp("single") / "model.safetensors")


@pytest.fixture(scope="module")
def loras(nano_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_loras(nano_folder("sd"), tmp_path_factory.mktemp("loras") / "loras")


def read_all(source: Path, **options: Any) -> None:
    """Everything that is read of a checkpoint but the weights themselves and tokenizers."""
    checkpoint = open_checkpoint(source, **options)
    assert isinstance(checkpoint.metadata, dict)
    for component in weighted_components(checkpoint):
        checkpoint.config(component)
        checkpoint.tensors(component)
        checkpoint.header(component)
    if "scheduler" in checkpoint.index:
        checkpoint.config("scheduler")
    if not options:
        checkpoint.check_small_files()


def check_loaded(source: Path, **options: Any) -> None:
    """A model that is taken has finite weights, and is saved only if what it writes can be read."""
    model = load_diffusion_model(source, **options)
    parts = {name: part for name, part in vars(model).items() if isinstance(part, torch.nn.Module)}
    for part in parts.values():
        assert first_not_finite(part.state_dict().items()) is None


@fuzzed(250, name=st.sampled_from(PARSED), found=changes())
def test_checkpoint_folders(name: str, found: list[Change], models: dict[str, Path]) -> None:
    with copy_of(models[name]) as folder:
        apply(folder, found)
        refusal(lambda: read_all(folder))


@fuzzed(40, name=st.sampled_from(LOADED), found=changes(*STRUCTURAL, "fill", "copy_over", "repeat_key"))
def test_loaded_folders(name: str, found: list[Change], models: dict[str, Path]) -> None:
    with copy_of(models[name]) as folder:
        apply(folder, found)
        refusal(lambda: check_loaded(folder))


@fuzzed(15, found=changes(*STRUCTURAL, "fill", most=2))
def test_loaded_folders_with_prompts(found: list[Change], models: dict[str, Path]) -> None:
    with copy_of(models["sd"]) as folder:
        apply(folder, found)
        refusal(lambda: check_loaded(folder))


@fuzzed(60, found=changes(*STRUCTURAL, *BYTES, most=2))
def test_tokenizers(found: list[Change], models: dict[str, Path]) -> None:
    with copy_of(models["sd"]) as folder:
        apply(folder / "tokenizer", found)
        refusal(lambda: open_checkpoint(folder).tokenizer("tokenizer"))


@fuzzed(60, found=changes())
def test_single_files(found: list[Change], single: Path, models: dict[str, Path]) -> None:
    with copy_of(single) as file:
        apply(file, found)
        refusal(lambda: read_all(file, config=models["sd"]))


@pytest.fixture(scope="module")
def read_lora(models: dict[str, Path]) -> Callable[[Path], object]:
    """Read a LoRA file for nano SD."""
    model = load_text_to_image(models["sd"], empty=True)
    layers = {"unet": model.denoiser, "text_encoder": empty_module(model.checkpoint, "text_encoder")}
    names = names_in_files(layers, StableDiffusion)
    return lambda path: read_updates(path, names, "unet")


@fuzzed(200, found=changes(), which=st.integers(0, 4))
def test_lora_files(found: list[Change], which: int, loras: Path, read_lora: Callable[[Path], object]) -> None:
    """What is taken of a LoRA is finite."""
    with copy_of(loras) as folder:
        file = sorted(folder.glob("*.safetensors"))[which]
        apply(folder, [change._replace(file=which + 1) for change in found])
        refusal(lambda: read_lora(file))

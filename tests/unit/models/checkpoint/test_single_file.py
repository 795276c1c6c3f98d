"""Single files in the original layout: read, written, and read by diffusers; at full size by names and shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from helpers import folder_weights
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn

from erasediff.errors import UserError
from erasediff.io.tensor_file import StoredTensor
from erasediff.models.checkpoint.components import empty_module
from erasediff.models.checkpoint.default_configs import KNOWN_CONFIGS
from erasediff.models.checkpoint.original_layout import LAYOUTS, from_original, to_original
from erasediff.models.load import load_text_to_image

pytestmark = pytest.mark.usefixtures("one_thread")
LAYOUT_OF = {"sd": "sd1", "sd_v_prediction": "sd2", "sdxl": "sdxl"}
every_layout = pytest.mark.parametrize("name", list(LAYOUT_OF))
Folder = Callable[[str], Path]


def assert_same_bits(own: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert own.keys() == theirs.keys()
    assert all(tensor.dtype == theirs[name].dtype for name, tensor in own.items())
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in own.items())


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@every_layout
def test_folder_to_file_to_folder_keeps_every_bit(name: str, nano_folder: Folder, tmp_path: Path) -> None:
    source, single = nano_folder(name), tmp_path / "model.safetensors"
    model: Any = load_text_to_image(source)
    model.save(single, layout="single-file")
    assert model.original_layout == LAYOUT_OF[name]
    read: Any = load_text_to_image(single, config=source)
    assert read.process.prediction_type == model.process.prediction_type
    assert read.denoiser_hash() == model.denoiser_hash()
    assert read.hash == model.hash
    read.checkpoint.check_small_files()
    read.save(tmp_path / "folder")
    canonical = {key.replace("text_model.", ""): value for key, value in folder_weights(source).items()}
    assert_same_bits(
        {key.replace("text_model.", ""): v for key, v in folder_weights(tmp_path / "folder").items()}, canonical
    )
    again: Any = load_text_to_image(tmp_path / "folder")
    again.save(tmp_path / "again.safetensors", layout="single-file")
    assert (tmp_path / "again.safetensors").read_bytes() == single.read_bytes()


@every_layout
def test_diffusers_reads_the_file_and_predicts_the_same(name: str, nano_folder: Folder, tmp_path: Path) -> None:
    source, single = nano_folder(name), tmp_path / "model.safetensors"
    model: Any = load_text_to_image(source)
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.add_(0.01)
    model.save(single, layout="single-file")
    cls = StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionPipeline
    theirs = cls.from_single_file(str(single), config=str(source), local_files_only=True)
    latents = torch.randn(1, *model.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    condition = model.encode_prompts(["a cat"]) | model.size_condition((32, 32), (0, 0), (32, 32), 1)
    timesteps = torch.tensor([500])
    own = model.predict(model.denoiser, latents, timesteps, condition)
    assert torch.equal(own, model.predict(theirs.unet, latents, timesteps, condition))
    assert torch.equal(
        model.decode_latents(latents),
        theirs.vae.decode(latents / theirs.vae.config.scaling_factor, return_dict=False)[0].clamp(-1, 1),
    )
    encoded = theirs.encode_prompt("a cat", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    assert torch.equal(encoded[0], condition["encoder_hidden_states"])
    if name == "sdxl":
        assert torch.equal(encoded[2], condition["text_embeds"])


@every_layout
def test_unlearned_file_keeps_what_it_held_but_no_older_average(name: str, nano_folder: Folder, tmp_path: Path) -> None:
    """Buffers of the original code stay; weights averaged before the unlearning would bring back what was unlearned."""
    source, single = nano_folder(name), tmp_path / "model.safetensors"
    load_text_to_image(source).save(single, layout="single-file", dtype=torch.float16)
    extra = {"alphas_cumprod": torch.rand(10), "cond_stage_model.model.logit_scale": torch.tensor(4.6)}
    average = {"model_ema.diffusion_modelout2weight": torch.ones(3)}
    save_file({**load(single.read_bytes()), **extra, **average}, single, metadata={"modelspec.author": "someone"})
    model: Any = load_text_to_image(single, config=source)
    with torch.no_grad():
        model.denoiser.conv_out.weight.add_(1.0)
    model.save(tmp_path / "out.safetensors", layout="single-file")
    own, theirs = load_file(tmp_path / "out.safetensors"), load_file(single)
    changed = "model.diffusion_model.out.2.weight"
    assert torch.equal(own.pop(changed), model.denoiser.conv_out.weight.detach().half())
    del theirs[changed], theirs["model_ema.diffusion_modelout2weight"]
    assert_same_bits(own, theirs)
    assert metadata(tmp_path / "out.safetensors")["modelspec.author"] == "someone"


def test_metadata_says_what_the_model_is(nano_folder: Folder, tmp_path: Path) -> None:
    said = {}
    for name in LAYOUT_OF:
        load_text_to_image(nano_folder(name)).save(tmp_path / f"{name}.safetensors", layout="single-file")
        said[name] = metadata(tmp_path / f"{name}.safetensors")
    assert {name: value["modelspec.architecture"] for name, value in said.items()} == {
        "sd": "stable-diffusion-v1",
        "sd_v_prediction": "stable-diffusion-v2-768-v",
        "sdxl": "stable-diffusion-xl-v1-base",
    }
    assert {name: value["modelspec.prediction_type"] for name, value in said.items()} == {
        "sd": "epsilon",
        "sd_v_prediction": "v",
        "sdxl": "epsilon",
    }
    assert all(value["modelspec.resolution"] == "32x32" for value in said.values())


def test_what_sdxl_predicts_is_marked_as_other_tools_read_it(nano_folder: Folder, nano: Any, tmp_path: Path) -> None:
    pipeline = nano.sdxl()
    pipeline.scheduler = type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    pipeline.save_pretrained(tmp_path / "v")
    load_text_to_image(tmp_path / "v").save(tmp_path / "v.safetensors", layout="single-file")
    assert {"v_pred", "ztsnr"} <= load_file(tmp_path / "v.safetensors").keys()
    pipeline.scheduler = nano.sdxl().scheduler
    save_file(load((tmp_path / "v.safetensors").read_bytes()), tmp_path / "v.safetensors")
    read: Any = load_text_to_image(tmp_path / "v.safetensors", config=nano_folder("sdxl"))
    assert read.process.prediction_type == "v_prediction"
    assert read.scheduler.config.rescale_betas_zero_snr


def test_families_without_a_single_file_say_so(nano_folder: Folder, tmp_path: Path) -> None:
    for name in ("sd3", "flux"):
        with pytest.raises(UserError, match="no single-file layout"):
            load_text_to_image(nano_folder(name)).save(tmp_path / "x.safetensors", layout="single-file")
    assert list(tmp_path.iterdir()) == []


def test_existing_file_is_not_overwritten_unless_asked_for(nano_folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("mine")
    model = load_text_to_image(nano_folder("sd"))
    with pytest.raises(UserError, match="exists already"):
        model.save(tmp_path / "x.safetensors", layout="single-file")
    assert (tmp_path / "x.safetensors").read_text() == "mine"
    model.save(tmp_path / "x.safetensors", layout="single-file", replace=True)
    assert load_file(tmp_path / "x.safetensors")


PARAMETERS = {
    ("sd1", "unet"): 859_520_964,
    ("sd1", "vae"): 83_653_863,
    ("sd1", "text_encoder"): 123_060_480,
    ("sd2", "unet"): 865_910_724,
    ("sd2", "text_encoder"): 340_387_840,
    ("sdxl", "unet"): 2_567_463_684,
    ("sdxl", "text_encoder_2"): 694_659_840,
}
"""Values published with the models."""


def full_size(layout: str, component: str) -> nn.Module:
    configs = KNOWN_CONFIGS[layout]
    checkpoint: Any = SimpleNamespace(path="known", index=configs["index"], config=configs.__getitem__)
    return empty_module(checkpoint, component)


@pytest.mark.parametrize(("layout", "component"), list(PARAMETERS))
def test_known_configurations_are_the_published_models(layout: str, component: str) -> None:
    module = full_size(layout, component)
    assert sum(parameter.numel() for parameter in module.parameters()) == PARAMETERS[layout, component]


def nothing() -> Tensor:
    raise AssertionError("names and shapes are enough")


@pytest.mark.parametrize(("layout", "component"), list(PARAMETERS))
def test_full_size_layout_is_the_one_diffusers_converts(layout: str, component: str) -> None:
    module = full_size(layout, component)
    config: Any = module.config
    state = module.state_dict()
    names = {name: StoredTensor(value.dtype, tuple(value.shape), nothing) for name, value in state.items()}
    original = to_original(LAYOUTS[layout][component], names, config)
    back = from_original(LAYOUTS[layout][component], original, names, config)
    assert {name: tensor.shape for name, tensor in back.items()} == {name: t.shape for name, t in names.items()}

    meta = {key: torch.empty(tensor.shape, device="meta") for key, tensor in original.items()}
    if component == "unet":
        theirs = convert_ldm_unet_checkpoint(meta, config)
    elif component == "vae":
        theirs = convert_ldm_vae_checkpoint(meta, config)
    elif "in_proj" in " ".join(meta):
        prefix = "cond_stage_model.model." if layout == "sd2" else "conditioner.embedders.1.model."
        theirs = convert_open_clip_checkpoint(module, meta, prefix)
    else:
        theirs = {key.removeprefix("cond_stage_model.transformer."): value for key, value in meta.items()}
    found = {name.removeprefix("text_model."): tuple(value.shape) for name, value in theirs.items()}
    assert found == {name.removeprefix("text_model."): tensor.shape for name, tensor in names.items()}

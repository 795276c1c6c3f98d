"""Loading refuses unusable sources in one sentence that says what to do, before any weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

from erasediff.errors import UserError
from erasediff.models.checkpoint.hub import clip_tokenizer
from erasediff.models.load import load_text_to_image

pytestmark = pytest.mark.usefixtures("one_thread")
Folder = Callable[[str], Path]


@pytest.fixture
def copied(nano_folder: Folder, tmp_path: Path) -> Callable[..., Path]:
    def copy(name: str, to: str | None = None) -> Path:
        return Path(shutil.copytree(nano_folder(name), tmp_path / (to or name)))

    return copy


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(source: Path | str, match: str, **options: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load_text_to_image(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "safetensors."))


def test_wrong_folder(copied: Folder, tmp_path: Path) -> None:
    folder = copied("sd")
    refused(tmp_path / "nowhere" / "at" / "all", "does not exist")
    refused(folder / "unet", "one component of a model, not the model")
    refused(folder / "tokenizer", "no model_index.json")
    refused(folder / "model_index.json", "neither a diffusers folder nor")
    edit(folder / "model_index.json", _class_name="StableDiffusionInpaintPipeline")
    refused(folder, "StableDiffusionInpaintPipeline, which is not among the families")
    (folder / "model_index.json").write_text("{")
    refused(folder, "damaged")


def test_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("erasediff.models.checkpoint.hub.snapshot_download", offline)
    refused("some-one/some-model", "neither in the cache of the Hugging Face hub nor can it be downloaded")


def test_hub_id_loads_from_what_was_downloaded(monkeypatch: pytest.MonkeyPatch, nano_folder: Folder) -> None:
    monkeypatch.setattr("erasediff.models.checkpoint.hub.snapshot_download", lambda *_, **__: str(nano_folder("sd")))
    assert load_text_to_image("some-one/some-model").family == "sd"


def test_single_file_takes_its_tokenizer_from_the_hub(monkeypatch: pytest.MonkeyPatch, nano_folder: Folder) -> None:
    tokenizer = str(nano_folder("sd") / "tokenizer")
    monkeypatch.setattr("erasediff.models.checkpoint.hub.snapshot_download", lambda *_, **__: tokenizer)
    openai, openclip = clip_tokenizer("<|endoftext|>"), clip_tokenizer("!")
    assert openai("a", padding="max_length").input_ids[-1] == openai.eos_token_id
    assert openclip("a", padding="max_length").input_ids[-1] == openclip.convert_tokens_to_ids("!")

    def offline(*_: Any, **__: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("erasediff.models.checkpoint.hub.snapshot_download", offline)
    with pytest.raises(UserError, match=r"comes without its tokenizer, .*: give a diffusers folder"):
        clip_tokenizer("!")


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
@pytest.mark.parametrize("how", ["from the folder", "from the index", "its configuration"])
def test_missing_component(copied: Folder, component: str, how: str) -> None:
    folder = copied("sd")
    match how:
        case "from the folder":
            shutil.rmtree(folder / component)
        case "from the index":
            index = json.loads((folder / "model_index.json").read_text())
            index[component] = [None, None]
            (folder / "model_index.json").write_text(json.dumps(index))
        case _:
            for path in (folder / component).glob("*.json"):
                path.unlink()
    refused(folder, component)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_damaged_weights(copied: Folder, component: str) -> None:
    folder = copied("sd")
    path = next((folder / component).glob("*.safetensors"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(folder, "cannot be read as safetensors")
    path.write_bytes(whole)
    tensors = load(path.read_bytes())
    name = next(key for key, value in tensors.items() if value.ndim == 2)
    save_file({key: value for key, value in tensors.items() if key != name}, path, {"format": "pt"})
    refused(folder, f"{component} .* is incomplete: it has no weight")
    save_file({**tensors, name: torch.zeros(3, 5)}, path, {"format": "pt"})
    refused(folder, r"does not fit its configuration: .* is \[3, 5\]")


def test_missing_shard(nano: Any, tmp_path: Path) -> None:
    folder = nano.save("sd", tmp_path / "sd", max_shard_size="50KB")
    load_text_to_image(folder)
    next((folder / "unet").glob("*-of-*")).unlink()
    refused(folder, "which is missing: copy or download it")


def test_variant_is_read_where_there_is_nothing_else(nano: Any, nano_folder: Folder, tmp_path: Path) -> None:
    folder = nano.save("sd", tmp_path / "sd", variant="fp16")
    model: Any = load_text_to_image(folder)
    plain: Any = load_text_to_image(nano_folder("sd"))
    assert model.denoiser_hash() == plain.denoiser_hash()


@pytest.mark.parametrize(
    ("name", "component", "changes", "match"),
    [
        ("sd", "text_encoder", {"hidden_size": 16}, "does not fit its configuration"),
        ("sd", "unet", {"cross_attention_dim": 48}, "does not fit its configuration"),
        ("sd", "vae", {"down_block_types": ["Nonsense"]}, "configuration of vae .* is damaged"),
    ],
)
def test_configuration_that_the_weights_do_not_fit(
    copied: Folder, name: str, component: str, changes: dict[str, Any], match: str
) -> None:
    folder = copied(name)
    edit(folder / component / "config.json", **changes)
    refused(folder, match)


def test_parts_of_different_models(copied: Folder) -> None:
    sd, sdxl, flux, sd3 = copied("sd"), copied("sdxl"), copied("flux"), copied("sd3")

    def transplanted(source: Path, target: Path, component: str) -> Path:
        shutil.rmtree(target / component)
        shutil.copytree(source / component, target / component)
        return target

    refused(transplanted(sdxl, sd, "unet"), "cross_attention_dim is 80, but the text encoder's hidden_size is 32")
    refused(transplanted(flux, sdxl, "vae"), "in_channels is 4, but the VAE's latent_channels is 8")
    refused(transplanted(flux, sd3, "transformer"), "is a FluxTransformer2DModel, not a SD3Transformer2DModel")


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("sd", {"prediction_type": "flow_prediction"}, "'flow_prediction' is none of"),
        ("sd", {"rescale_betas_zero_snr": True}, "makes the last timestep pure noise"),
    ],
)
def test_scheduler_that_contradicts_itself(copied: Folder, name: str, changes: dict[str, Any], match: str) -> None:
    folder = copied(name)
    edit(folder / "scheduler" / "scheduler_config.json", **changes)
    refused(folder, match)


def test_scheduler_of_another_kind(copied: Folder) -> None:
    sd, flux = copied("sd"), copied("flux")
    for folder, other in ((sd, "FlowMatchEulerDiscreteScheduler"), (flux, "PNDMScheduler")):
        edit(folder / "model_index.json", scheduler=["diffusers", other])
    refused(sd, "FlowMatchEulerDiscreteScheduler is not for a network trained by denoising diffusion")
    refused(flux, "PNDMScheduler is not for a network trained by flow matching")


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_solver_with_flow_sigmas_takes_the_place_of_euler(copied: Callable[..., Path], name: str) -> None:
    folder = copied("sd3")
    edit(folder / "model_index.json", scheduler=["diffusers", name])
    config = {"_class_name": name, "use_flow_sigmas": True, "flow_shift": 3.0}
    edit(folder / "scheduler" / "scheduler_config.json", **config)
    refused(folder, f"{name} contradicts itself: its prediction_type is 'epsilon'")
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="flow_prediction")
    model: Any = load_text_to_image(folder)
    torch.testing.assert_close(model.process.alpha + model.process.sigma, torch.ones(1000))
    assert torch.equal(model.process.sigma, load_text_to_image(copied("sd3", "euler")).process.sigma)
    images = model.sample(["a cat"], num_inference_steps=2)
    assert images.shape == (1, 32, 32, 3)


def test_scheduler_that_contradicts_what_the_weights_record(copied: Folder, tmp_path: Path) -> None:
    load_text_to_image(copied("sd_v_prediction")).save(tmp_path / "saved")
    edit(tmp_path / "saved" / "scheduler" / "scheduler_config.json", prediction_type="epsilon")
    refused(tmp_path / "saved", "prediction_type is epsilon, the weights record v_prediction")


def test_pickles_are_refused_unopened(copied: Folder, tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"cos\nsystem\n")
    refused(tmp_path / "model.ckpt", "pickle, which can run code when it is opened: convert them")
    refused("model.ckpt", "pickle")
    folder = copied("sd")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    refused(folder, "holds its weights as pickles, .* convert them")


def test_single_file_that_is_none(nano_folder: Folder, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    refused(path, "does not exist")
    path.write_bytes(b"no")
    refused(path, "cannot be read as safetensors")
    for key, match in {
        "lora_unet_down_blocks_0_x.lora_down.weight": "is a LoRA, not a model",
        "conditioner.embedders.0.model.ln_final.weight": "refiner of SDXL",
        "model.diffusion_model.double_blocks.0.img_attn.proj.weight": "without a text encoder of SD 1.x, 2.x or SDXL",
        "x": "not a single file of SD 1.x",
    }.items():
        save_file({key: torch.zeros(1)}, path)
        refused(path, match)


def test_single_file_of_another_size_than_its_configuration(nano: Any, nano_folder: Folder, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    load_text_to_image(nano_folder("sd")).save(path, layout="single-file")
    refused(path, "does not fit its configuration")
    tensors = load(path.read_bytes())
    save_file({key: value for key, value in tensors.items() if not key.startswith("first_stage_model.")}, path)
    refused(path, "vae .* is incomplete", config=nano_folder("sd"))


def test_single_file_that_does_not_say_what_it_predicts(nano_folder: Folder, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    load_text_to_image(nano_folder("sd_v_prediction")).save(path, layout="single-file")
    save_file({key: value for key, value in load(path.read_bytes()).items() if key != "v_pred"}, path)
    refused(path, "does not say if it predicts epsilon")
    refused(path, "makes the last timestep|does not fit its configuration", prediction_type="v_prediction")


def test_single_file_and_configuration_that_contradict_each_other(nano_folder: Folder, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    load_text_to_image(nano_folder("sd_v_prediction")).save(path, layout="single-file")
    options = {"config": nano_folder("sd"), "prediction_type": "epsilon"}
    refused(path, "prediction_type is epsilon, the weights record v", **options)


def test_nothing_is_written_when_a_save_fails(nano_folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    model = load_text_to_image(nano_folder("sd"))
    with pytest.raises(UserError, match="exists already"):
        model.save(tmp_path / "out")
    with pytest.raises(UserError, match="is where the model came from"):
        model.save(nano_folder("sd"), replace=True)
    assert list((tmp_path / "out").iterdir()) == []

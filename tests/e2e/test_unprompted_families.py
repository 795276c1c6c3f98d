"""Families without prompts from the command line: unlearn, load by diffusers, sample, judge, plan, measure, adapt."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import Ended, folder_weights
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from pictures import class_pictures
from safetensors.torch import load_file, save_file
from torch import Tensor

from erasediff.methods import METHOD_SPECS

NANO = """
threads: 1
unlearn: {steps: 3, batch_size: 4, lr: 1.0e-3}
sample: {num_inference_steps: 2}
evaluate: {per_class: 2, forgotten: 3, unconditional: 6}
run: {log_every: 1, checkpoint_every: 2}
"""
DENOISERS = {"dit": "transformer", "ldm": "unet", "ddpm_timestep": "unet", "ddpm_class": "unet"}
LATENT = ("dit", "ldm")
Run = Callable[..., Ended]
Folder = Callable[[str], Path]

pytestmark = pytest.mark.usefixtures("here", "one_thread")


@pytest.fixture
def data(here: Path) -> Path:
    """A folder of six images for each of three classes."""
    return class_pictures(here / "data")


def unlearn(model: object, *flags: object, out: str = "out") -> tuple[object, ...]:
    chosen = ("--data", "data", "--forget-class", "cat")
    return ("unlearn", "--model", model, "--config", "nano.yaml", "--out", out, "--json", *chosen, *flags)


def told(run: Run, *arguments: object) -> dict[str, Any]:
    ended = run(*arguments)
    assert ended.code == 0, ended.errors
    result: dict[str, Any] = json.loads(ended.output)
    return result


def half(model: Path, component: str) -> Path:
    """``model`` with a component's weights in float16."""
    file = model / component / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return model


def changed(before: Path, after: Path) -> set[str]:
    """Names of the tensors whose dtype or bits differ."""
    old, new = folder_weights(before), folder_weights(after)
    assert old.keys() == new.keys()
    return {name for name in old if old[name].dtype != new[name].dtype or not torch.equal(old[name], new[name])}


def predicted(pipeline: Any, component: str) -> Tensor:
    """The prediction of a pipeline's denoiser for some noise."""
    network = getattr(pipeline, component)
    config = network.config
    noise = torch.randn(2, config.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = {"class_labels": torch.tensor([1, 2])} if component == "transformer" else {}
    prediction: Tensor = network(noise, timestep=torch.tensor([3, 50]), **labels, return_dict=False)[0]
    return prediction


@pytest.mark.parametrize("name", ["dit", "ldm", "ddpm_timestep"])
def test_what_was_unlearned_is_loaded_by_diffusers_and_all_else_keeps_its_bits(
    run: Run, nano_folder: Folder, here: Path, data: Path, name: str
) -> None:
    component = DENOISERS[name]
    model = half(Path(shutil.copytree(nano_folder(name), here / "half")), component)
    (model / "LICENSE").write_text("as is")
    chosen = "time_embed" if component == "unet" else "transformer_blocks.1"
    told(run, *unlearn(model, "--train", f"re:{chosen}", "--set", "output.dtype=stored"))
    moved = changed(model, here / "out/model")
    assert moved
    assert all(name.startswith(component) and chosen in name for name in moved)
    assert {t.dtype for n, t in folder_weights(here / "out/model").items() if n.startswith(component)} == {
        torch.float16
    }
    assert (here / "out/model/LICENSE").read_text() == "as is"

    pipeline = DiffusionPipeline.from_pretrained(here / "out/model")
    original = DiffusionPipeline.from_pretrained(model)
    assert type(pipeline) is type(original)
    assert pipeline.scheduler.config == original.scheduler.config
    if name in LATENT:
        assert not torch.equal(predicted(pipeline, component), predicted(original, component))
    if name == "dit":
        assert pipeline.get_label_ids(["aeroplane"]) == [0]

    classes = () if name == "ldm" else ("--classes", "cat,bird")
    sampled = told(
        run, "sample", "--model", "out/model", "--count", 2, "--out", "i", "--json", "--config", "nano.yaml", *classes
    )
    assert sampled["images"] == (2 if name == "ldm" else 4)


@pytest.mark.parametrize("name", ["dit", "ldm"])
def test_commands_of_pixel_models_take_latents_too(
    run: Run, nano_folder: Folder, here: Path, data: Path, name: str
) -> None:
    model = nano_folder(name)
    common = ("--config", "nano.yaml", "--json")
    told(run, *unlearn(model))
    shutil.copytree(here / "out", here / "resumed")
    shutil.rmtree(here / "resumed/model")
    told(run, "unlearn", "--resume", "resumed/checkpoint-2", "--json")
    assert not changed(here / "out/model", here / "resumed/model")
    judged = told(run, "evaluate", "--model", "out/model", "--base", model, "--data", data, "--forget", "cat", *common)
    assert judged["model"]["forget"] == [2]
    assert told(run, "plan", "--model", model, "--ranks", "1", "--json")["resolution"] == 32
    for command, flag in (("unlearn", ("--dry-run",)), ("bench", ("--turns", 2))):
        measured = told(run, command, *unlearn(model)[1:5], "--data", data, "--forget-class", "cat", "--json", *flag)
        assert measured["parameters"] == measured["parameters_trained"]


@pytest.mark.parametrize("name", ["dit", "ldm", "ddpm_class"])
def test_a_lora_is_saved_in_keys_of_peft_loaded_back_and_merged(
    run: Run, nano_folder: Folder, here: Path, data: Path, name: str
) -> None:
    component, model = DENOISERS[name], nano_folder(name)
    flags = ("--train", "lora", "--set", "text_to_image.lora_rank=2", "--set", "unlearn.ema_decay=null")
    told(run, *unlearn(model, *flags))
    moved = changed(model, here / "out/model")
    assert moved
    assert all(".attn" in name or ".attentions." in name for name in moved)

    state = load_file(here / "out/lora.safetensors")
    assert all(key.startswith(f"{component}.") for key in state)
    network = getattr(DiffusionPipeline.from_pretrained(model), component)
    own = {key.removeprefix(f"{component}."): value for key, value in state.items()}
    targets = [key.removesuffix(".lora_A.weight") for key in own if key.endswith(".lora_A.weight")]
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=targets), network)
    assert not set_peft_model_state_dict(network, own).unexpected_keys
    merged = getattr(DiffusionPipeline.from_pretrained(here / "out/model"), component)
    for name_, layer in network.named_modules():
        if hasattr(layer, "lora_A"):
            layer.merge()
            torch.testing.assert_close(layer.get_base_layer().weight, merged.get_submodule(name_).weight)

    for source, lora, folder in ((model, ("--lora", "out/lora.safetensors"), "a"), ("out/model", (), "b")):
        told(run, "sample", "--model", source, "--count", 1, "--out", folder, "--config", "nano.yaml", "--json", *lora)
    told(run, *unlearn(model, "--lora", "out/lora.safetensors", out="further"))
    digests = [[hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((here / f).iterdir())] for f in "ab"]
    assert digests[0] == digests[1]


def test_the_dtype_that_keeps_the_update_is_that_of_any_model(
    run: Run, nano_folder: Folder, here: Path, data: Path
) -> None:
    model = half(Path(shutil.copytree(nano_folder("ddpm_class"), here / "half")), "unet")
    ended = run(*unlearn(model, "--lr", 1e-5))
    assert ended.code == 0, ended.errors
    assert "The stored dtype would lose" in ended.errors
    moved = changed(model, here / "out/model")
    saved = folder_weights(here / "out/model")
    assert {saved[name].dtype for name in moved} == {torch.float32}
    told(run, *unlearn(model, "--set", "output.dtype=bfloat16", "--set", "output.max_shard_bytes=20000", out="b"))
    assert {tensor.dtype for tensor in folder_weights(here / "b/model").values()} == {torch.bfloat16}
    assert len(list((here / "b/model/unet").glob("*-of-*"))) > 1
    assert DiffusionPipeline.from_pretrained(here / "b/model").unet.config.num_class_embeds == 4


@pytest.mark.parametrize("method", [name for name, spec in METHOD_SPECS.items() if spec.build])
def test_a_method_runs_on_a_transformer_of_classes_or_says_that_it_needs_prompts(
    run: Run, nano_folder: Folder, data: Path, method: str
) -> None:
    short = {"salun": ("salun.batches=1",), "selective-amnesia": ("selective_amnesia.fisher_batches=1",)}
    settings = [flag for setting in short.get(method, ()) for flag in ("--set", setting)]
    ended = run(*unlearn(nano_folder("dit"), "--method", method, *settings))
    if ended.code != 0:
        assert ended.code == 2, ended.errors
        assert f"The method {method} needs prompts" in " ".join(ended.errors.split())


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("dit", ("--set", "output.layout=single-file"), "A dit model has no single-file layout here"),
        ("dit", ("--train", "lora", "--set", "output.lora_keys=kohya"), "has no kohya keys here"),
        ("dit", ("--set", "text_to_image.anchor_prompts=[a dog]"), "is for text-to-image models"),
        ("ldm", ("--relabel-class", "bird", "--set", "unlearn.target=relabel"), "needs a class-conditional model"),
        ("no_attention", ("--train", "lora"), "A LoRA adapts attention, of which this UNet2DModel has none"),
        ("identity", (), "class_embed_type 'identity', which takes vectors"),
        ("unknown", (), "is a FlowPipeline, which is not among the families known here: "),
        ("strangers", (), "The model has 4 classes, none of which is called airplane"),
        ("incomplete", (), "it has no incomplete/vqvae/config.json"),
        ("not_finite", (), "The vqvae of not_finite has weights that are not finite"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    run: Run, nano: Any, nano_folder: Folder, here: Path, data: Path, name: str, flags: tuple[str, ...], said: str
) -> None:
    damage = {"unknown": "dit", "strangers": "dit", "incomplete": "ldm", "not_finite": "ldm"}
    if name == "no_attention":
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        nano._unet2d(3, 32, 4, add_attention=False, **blocks).save_pretrained(here / name)
    elif name == "identity":
        nano._unet2d(3, 32, class_embed_type="identity").save_pretrained(here / name)
    elif name in damage:
        damaged(Path(shutil.copytree(nano_folder(damage[name]), here / name)), name)
    else:
        (here / name).symlink_to(nano_folder(name))
    ended = run(*unlearn(name, *flags))
    assert ended.code == 2, ended.errors
    sentence = " ".join(ended.errors[ended.errors.rfind("Error:") :].split())
    assert said in sentence
    assert not (here / "out").exists()


def damaged(model: Path, how: str) -> None:
    index = json.loads((model / "model_index.json").read_text())
    if how == "unknown":
        index["_class_name"] = "FlowPipeline"
    elif how == "strangers":
        index["id2label"] = {"0": "bird"}
    elif how == "incomplete":
        shutil.rmtree(model / "vqvae")
    else:
        file = model / "vqvae/diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        next(iter(tensors.values())).view(-1)[0] = float("nan")
        save_file(tensors, file, {"format": "pt"})
    (model / "model_index.json").write_text(json.dumps(index))

"""Models in pixels of any size, from the command line: train, unlearn, sample, evaluate, plan, measure, resume."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline, UNet2DModel
from helpers import Ended, folder_weights
from pictures import CLASS_NAMES as NAMES
from pictures import class_pictures as pictures
from PIL import Image

NANO = """
threads: 1
model: {block_out_channels: [8, 16], layers_per_block: 1}
train: {steps: 3, batch_size: 4}
unlearn: {steps: 3, batch_size: 4, lr: 1.0e-3}
sample: {num_inference_steps: 2}
evaluate: {per_class: 2, forgotten: 3, unconditional: 6}
run: {log_every: 1, checkpoint_every: 2}
"""
Run = Callable[..., Ended]
Folder = Callable[[str], Path]

pytestmark = pytest.mark.usefixtures("here", "one_thread")


def unlearn(model: object, *flags: object, out: str = "out") -> tuple[object, ...]:
    return ("unlearn", "--model", model, "--config", "nano.yaml", "--out", out, "--json", *flags)


def told(run: Run, *arguments: object) -> dict[str, object]:
    ended = run(*arguments)
    assert ended.code == 0, ended.errors
    result: dict[str, object] = json.loads(ended.output)
    return result


def test_a_class_is_forgotten_by_name_or_number_and_diffusers_loads_the_result(
    run: Run, nano_folder: Folder, here: Path
) -> None:
    data, model = pictures(here / "data"), nano_folder("ddpm_class")
    told(run, *unlearn(model, "--data", data, "--forget-class", "bird"))
    told(run, *unlearn(model, "--data", data, "--forget", "1", out="again"))
    before, after, again = (folder_weights(folder) for folder in (model, here / "out/model", here / "again/model"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], again[name]) for name in after)
    assert any(not torch.equal(after[name], before[name]) for name in after)
    pipeline = DDPMPipeline.from_pretrained(here / "out/model")
    assert pipeline.scheduler.config.num_train_timesteps == 100
    labels = torch.tensor([0, 3])
    assert pipeline.unet(torch.zeros(2, 3, 32, 32), torch.tensor([0, 99]), labels).sample.shape == (2, 3, 32, 32)
    sampled = told(
        run, "sample", "--model", "out/model", "--classes", "cat,0", "--count", 2, "--out", "images",
        "--config", "nano.yaml", "--json",
    )  # fmt: skip
    assert sampled["images"] == 4
    assert Image.open("images/class-2-00000.png").size == (32, 32)


def test_an_unconditional_model_forgets_files_of_data_without_classes(
    run: Run, nano_folder: Folder, here: Path
) -> None:
    data = pictures(here / "tree", grey=True)
    flat = here / "flat"
    flat.mkdir()
    for path in data.rglob("*.png"):
        shutil.copy(path, flat / f"{path.parent.name}-{path.name}")
    (here / "request.txt").write_text("bird-0.png\nbird-1.png\n")
    model = nano_folder("ddpm_unconditional")
    told(run, *unlearn(model, "--data", flat, "--forget-files", "request.txt"))
    forgotten = [json.loads(line) for line in (here / "out/forget.jsonl").read_text().splitlines()]
    assert [Path(image["image"]).name for image in forgotten] == ["bird-0.png", "bird-1.png"]
    assert [image["selected_by"] for image in forgotten] == [["file: bird-0.png"], ["file: bird-1.png"]]
    assert forgotten[0]["sha256"] == hashlib.sha256((flat / "bird-0.png").read_bytes()).hexdigest()
    assert DDPMPipeline.from_pretrained(here / "out/model").unet.config.in_channels == 1
    told(run, "sample", "--model", "out/model", "--count", 3, "--out", "grid.png", "--config", "nano.yaml", "--json")


def test_a_model_without_a_null_label_keeps_its_pipeline_and_scheduler(
    run: Run, nano_folder: Folder, here: Path
) -> None:
    data = pictures(here / "data")
    told(run, *unlearn(nano_folder("ddim_class"), "--data", data, "--forget-class", "airplane"))
    pipeline = DiffusionPipeline.from_pretrained(here / "out/model")
    assert isinstance(pipeline, DDIMPipeline)
    assert pipeline.scheduler.config.num_train_timesteps == 100
    assert json.loads((here / "out/model/classes.json").read_text()) == {"names": list(NAMES), "null_label": None}
    told(run, "sample", "--model", "out/model", "--count", 1, "--out", "images", "--config", "nano.yaml", "--json")
    assert len(list((here / "images").iterdir())) == len(NAMES)


def test_a_network_without_a_pipeline_is_one_of_ddpm(run: Run, nano: object, here: Path) -> None:
    nano.ddpm_unconditional().unet.save_pretrained(here / "bare")  # type: ignore[attr-defined]
    ended = run(*unlearn("bare", "--data", pictures(here / "data"), "--forget-class", "cat"))
    assert ended.code == 0, ended.errors
    assert "bare has no scheduler: the linear schedule of DDPM" in ended.errors
    assert isinstance(DDPMPipeline.from_pretrained(here / "out/model").unet, UNet2DModel)
    assert told(run, "plan", "--model", "bare", "--ranks", "1", "--json")["resolution"] == 28


@pytest.mark.parametrize("flags", [(), ("--unconditional",)])
def test_a_small_model_is_trained_unlearned_judged_and_resumed(run: Run, here: Path, flags: tuple[str, ...]) -> None:
    data = pictures(here / "data", side=16, grey=not flags)
    common = ("--config", "nano.yaml", "--json")
    told(run, "train", "--data", data, "--out", "base", "--set", "precision=bf16-mixed", *flags, *common)
    config = json.loads((here / "base/model/unet/config.json").read_text())
    assert config["sample_size"] == [16, 16]
    assert config["in_channels"] == (3 if flags else 1)
    assert config["num_class_embeds"] == (None if flags else 4)

    forget = ("--data", data, "--forget-class", "cat")
    told(run, *unlearn("base/model", *forget))
    shutil.copytree(here / "out", here / "resumed")
    shutil.rmtree(here / "resumed/model")
    told(run, "unlearn", "--resume", "resumed/checkpoint-2", "--json")
    whole, resumed = folder_weights(here / "out/model"), folder_weights(here / "resumed/model")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    judged = told(
        run, "evaluate", "--model", "out/model", "--base", "base/model", "--data", data, "--forget", "cat", *common
    )
    assert judged["judge"]["accuracy"] == 1  # type: ignore[index]
    assert judged["model"]["forget"] == [2]  # type: ignore[index]
    assert told(run, "plan", "--model", "base/model", "--ranks", "1", "--json")["resolution"] == 16
    for command, flag in (("unlearn", ("--dry-run",)), ("bench", ("--turns", 2))):
        measured = told(run, command, "--model", "base/model", *forget, *common, *flag)
        assert measured["parameters"] == measured["parameters_trained"]


def test_chosen_weights_alone_are_trained(run: Run, nano_folder: Folder, here: Path) -> None:
    command = unlearn(nano_folder("ddpm_class"), "--data", pictures(here / "data"), "--forget-class", "cat")
    told(run, *command, "--train", "re:attentions", "--set", "text_to_image.gradient_checkpointing=true")
    before, after = folder_weights(nano_folder("ddpm_class")), folder_weights(here / "out/model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("attentions" in name for name in changed)


@pytest.mark.parametrize("method", ["finetune", "neggrad", "salun", "selective-amnesia", "retrain"])
def test_methods_of_images_run_on_pixels(run: Run, nano_folder: Folder, here: Path, method: str) -> None:
    short = {"salun": ("salun.batches=1",), "selective-amnesia": ("selective_amnesia.fisher_batches=1",)}
    settings = [flag for setting in short.get(method, ()) for flag in ("--set", setting)]
    command = unlearn(nano_folder("ddpm_class"), "--data", pictures(here / "data"), "--forget-class", "cat")
    told(run, *command, "--method", method, *settings)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--data", "data", "--forget-class", "birt"), "There is no class birt in the data: choose from bird."),
        (("--data", "data", "--forget-class", "7"), "There is no class 7 in the data"),
        (("--data", "data", "--forget-class", "cat", "--retain-class", "cat"), "forgotten and retained"),
        (("--data", "data", "--forget-class", "cat", "--relabel-class", "cat"), "choose a retained class"),
        (("--data", "data", "--forget-class", "cat", "--set", "unlearn.relabel_to=[]"), "no class to relabel to"),
        (("--data", "data"), "Nothing to forget"),
        (("--data", "two", "--forget-class", "cat"), "4 class embeddings"),
        (("--data", "loose", "--forget-files", "request.txt"), "has no class"),
        (("--forget", "3"), "name its own data with --data"),
        (("--data", "data", "--forget-class", "cat", "--method", "esd"), "esd needs prompts"),
        (("--data", "data", "--forget-class", "cat", "--train", "xatn"), "did you mean xattn"),
        (("--forget-prompts", "a cat", "--retain-prompts", "a dog"), "is for text-to-image models"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    run: Run, nano_folder: Folder, here: Path, flags: tuple[str, ...], said: str
) -> None:
    pictures(here / "data")
    shutil.rmtree(pictures(here / "two") / "cat")
    pictures(here / "two/more")
    shutil.rmtree(here / "two/more")
    (here / "two/cat").mkdir()
    shutil.copy(here / "data/cat/0.png", here / "two/cat/0.png")
    shutil.rmtree(here / "two/airplane")
    shutil.copytree(here / "data", here / "loose")
    shutil.copy(here / "data/cat/0.png", here / "loose/first.png")
    (here / "request.txt").write_text("first.png\n")
    ended = run(*unlearn(nano_folder("ddpm_class"), *flags))
    assert ended.code == 2, ended.errors
    sentence = ended.errors[ended.errors.rfind("Error:") :].strip()
    assert said in sentence
    assert "\n" not in sentence
    assert not (here / "out").exists()


def test_a_method_without_steps_that_needs_prompts_is_refused(run: Run, nano_folder: Folder) -> None:
    ended = run("unlearn", "--model", nano_folder("ddpm_class"), "--method", "saemnesia", "--out", "out")
    assert ended.code == 2
    assert "saemnesia needs prompts" in ended.errors

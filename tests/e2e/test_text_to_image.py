"""Text-to-image checkpoints through the command line: unlearn, save, reload with plain diffusers, sample."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline
from helpers import folder_weights, run_command, succeed
from nano import FAMILY_EXAMPLES
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from erasediff.config import Config, for_text_to_image, load_config
from erasediff.models.trainable import select
from erasediff.workflows.build_unlearning import build_unlearning_job

FAMILIES = FAMILY_EXAMPLES
NANO = """
threads: 1
images: {height: 32, width: 32, bucket_step: 16, images_per_prompt: 2}
unlearn: {steps: 2, batch_size: 2, lr: 1e-3}
sample: {num_inference_steps: 1}
run: {log_every: 1}
"""
SECONDS_TO_WAIT = 120
EXIF_ORIENTATION, TURNED_LEFT = 0x0112, 8

pytestmark = pytest.mark.usefixtures("one_thread")
Folder = Callable[[str], Path]


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert {name: tensor.dtype for name, tensor in before.items()} == {n: t.dtype for n, t in after.items()}
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def alive(kind: type) -> set[int]:
    """The objects of ``kind`` that are in memory."""
    gc.collect()
    return {id(thing) for thing in gc.get_objects() if type(thing) is kind}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned images of two classes, of mixed sizes and modes, one of them lying on its side."""
    folder = tmp_path_factory.mktemp("photos")
    turned = Image.Exif()
    turned[EXIF_ORIENTATION] = TURNED_LEFT
    for name, mode, size, exif in (
        ("cat/0.png", "RGB", (32, 32), None),
        ("cat/1.png", "RGBA", (40, 20), None),
        ("dog/2.png", "L", (64, 64), None),
        ("dog/3.jpg", "RGB", (48, 96), turned),
        ("dog/4.png", "P", (33, 31), None),
    ):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        Image.linear_gradient("L").resize(size).convert(mode).save(path, **({"exif": exif} if exif else {}))
        path.with_suffix(".txt").write_text(f"a {path.parent.name}")
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test in an empty folder of its own, with ``nano.yaml``; its cache is there too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ERASEDIFF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "nano.yaml").write_text(NANO)
    return tmp_path


@pytest.mark.parametrize("name", FAMILIES)
def test_unlearned_checkpoint_is_the_input_but_for_what_was_trained(
    name: str, nano: Any, nano_folder: Folder, photos: Path
) -> None:
    source, out = nano_folder(name), Path("out/model")
    common = ("--config", "nano.yaml", "--json")
    succeed("unlearn", "--model", source, "--data", photos, "--forget-class", "cat", "--out", "out", *common)

    before = DiffusionPipeline.from_pretrained(source)
    component = "unet" if hasattr(before, "unet") else "transformer"
    trained = {f"{component}.{name}" for name in select(getattr(before, component), "xattn")}
    differing = changed(folder_weights(source), folder_weights(out))
    assert differing
    assert differing <= trained

    after = DiffusionPipeline.from_pretrained(out)
    after.set_progress_bar_config(disable=True)
    assert after.scheduler.config == before.scheduler.config
    drawn = after("a dog", num_inference_steps=1, height=nano.SIZE, width=nano.SIZE, output_type="np").images
    assert drawn.shape == (1, nano.SIZE, nano.SIZE, 3)

    succeed("sample", "--model", out, "--prompts", "a dog; a cat", "--count", 2, "--out", "images", *common)
    assert sorted(path.name for path in Path("images").iterdir()) == [
        "prompt-0-00000.png",
        "prompt-0-00001.png",
        "prompt-1-00002.png",
        "prompt-1-00003.png",
    ]
    assert Image.open("images/prompt-0-00000.png").size == (nano.SIZE, nano.SIZE)


@pytest.mark.parametrize(
    "flags",
    [
        ("--train", "full", "--method", "finetune"),
        ("--train", "noxattn", "--method", "neggrad"),
        ("--train", "re:mid_block", "--barrier", "gap"),
        ("--target", "relabel", "--anchor-prompts", "a dog;a bird"),
        ("--target", "relabel", "--anchor-prompts", "a dog", "--set", "unlearn.teacher=current", "--train", "lora"),
        ("--set", "text_to_image.weights=bfloat16", "--set", "precision=bfloat16"),
        ("--set", "text_to_image.gradient_checkpointing=true", "--set", "unlearn.accumulation_steps=2"),
        ("--set", "unlearn.ema_decay=0.5", "--set", "images.mirror=true"),
        ("--set", "text_to_image.attention=native", "--set", "images.bucket_step=null"),
        # Models below the usual step have a single size.
        ("--set", "images.bucket_step=auto"),
    ],
)
def test_every_way_to_unlearn_runs(
    flags: tuple[str, ...], nano_folder: Folder, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = nano_folder("sd")
    chosen = ("--data", photos, "--forget-phrase", "cat")
    succeed("unlearn", "--model", source, *chosen, "--out", "out", "--config", "nano.yaml", "--json", *flags)
    assert json.loads(capsys.readouterr().out)["metrics"]["finite"] is True
    assert changed(folder_weights(source), folder_weights(Path("out/model")))


def test_forget_set_by_files_and_retain_set_from_prompts(nano_folder: Folder, photos: Path, here: Path) -> None:
    """Photos of a class and of a folder are forgotten; other photos, and what the model makes of prompts, retained."""
    (here / "request.txt").write_text("# as asked\ncat/0.png\n")
    (here / "prompts.txt").write_text("a dog\na bird\n")
    shutil.copytree(photos / "cat", here / "more")
    (here / "more/0.png").unlink()
    session = build_unlearning_job(
        load_config(
            here / "nano.yaml",
            {
                "unlearn.model": nano_folder("sd"),
                "images.data": str(photos),
                "images.forget_classes": ["cat"],
                "images.forget_data": str(here / "more"),
                "images.retain_prompts": ["a dog", "a bird"],
                "images.cache": "all",
            },
        ),
    )
    forget: Any = session.forget
    retain: Any = session.retain
    assert len(forget.images) == 3
    assert len(retain.images) == 3 + 2 * 2

    # The nearest caption is the forgotten image's own, of the other photo: to relabel it to that changes nothing.
    common = ("--model", nano_folder("sd"), "--config", "nano.yaml", "--forget-files", "request.txt")
    common += ("--anchor-prompts", "a dog")
    succeed("unlearn", *common, "--data", photos, "--retain-prompts", "prompts.txt", "--out", "out")
    assert "retain_prompts:\n  - a dog\n  - a bird" in Path("out/config.yaml").read_text()


def test_a_data_set_is_forgotten_by_its_labels(nano_folder: Folder, here: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "text": datasets.Value("string"),
        }
    )
    rows = {
        "image": [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")],
        "label": [0, 1, 1],
        "text": ["a cat", "a dog", "another dog"],
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(here / "pets")
    chosen = ("--data", here / "pets", "--forget-class", "cat")
    succeed("unlearn", "--model", nano_folder("sd"), *chosen, "--out", "out", "--config", "nano.yaml")
    assert changed(folder_weights(nano_folder("sd")), folder_weights(here / "out/model"))


def test_the_run_records_what_was_asked_for_and_refuses_to_go_on_with_other_images(
    nano_folder: Folder, photos: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photos, here / "mine")
    (here / "request.txt").write_text("dog/2.png\n")
    chosen = ("--data", "mine", "--forget-phrase", "cat", "--forget-files", "request.txt")
    succeed("unlearn", "--model", nano_folder("sd"), *chosen, "--config", "nano.yaml", "--out", "out")
    told = capsys.readouterr().err
    assert told.count("Request: forgetting 3 of 5 images (by file: 1, by phrase: 2), retaining 2.") == 1
    forgotten = [json.loads(line) for line in Path("out/forget.jsonl").read_text().splitlines()]
    assert [(entry["image"], entry["selected_by"]) for entry in forgotten] == [
        ("mine/cat/0.png", ["phrase: cat"]),
        ("mine/cat/1.png", ["phrase: cat"]),
        ("mine/dog/2.png", ["file: dog/2.png"]),
    ]
    retained = [json.loads(line) for line in Path("out/retain.jsonl").read_text().splitlines()]
    assert [entry["image"] for entry in retained] == ["mine/dog/3.jpg", "mine/dog/4.png"]
    content = (here / "mine/cat/0.png").read_bytes()
    assert forgotten[0]["sha256"] == hashlib.sha256(content).hexdigest()

    before = contents(here / "out")
    Image.new("RGB", (32, 32), "white").save(here / "mine/dog/4.png")
    assert run_command("unlearn", "--resume", "latest", "--out", "out") == 2
    assert "other images to retain than there are now: mine/dog/4.png has changed" in capsys.readouterr().err
    assert contents(here / "out") == before


def test_prompts_alone_suffice_and_the_cache_serves_the_next_run(
    nano_folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("unlearn", "--model", nano_folder("sd"), "--config", "nano.yaml")
    prompts = ("--forget-prompts", "a cat", "--retain-prompts", "a dog;a bird")
    succeed(*command, *prompts, "--out", "first")
    assert "Synthesising" in (told := capsys.readouterr().err)
    assert "Encoding images" in told
    succeed(*command, *prompts, "--out", "second", "--train", "lora")
    assert "Synthesising" not in (told := capsys.readouterr().err)
    assert "Encoding" not in told


def test_lora_is_saved_for_diffusers_and_merged(nano: Any, nano_folder: Folder, photos: Path) -> None:
    source = nano_folder("sd")
    train = ("--train", "lora", "--set", "text_to_image.lora_rank=2", "--set", "text_to_image.lora_alpha=4")
    chosen = ("--data", photos, "--forget-class", "cat", "--config", "nano.yaml")
    succeed("unlearn", "--model", source, *chosen, "--out", "out", *train)
    merged = DiffusionPipeline.from_pretrained("out/model").unet
    adapted = DiffusionPipeline.from_pretrained(source)
    adapted.load_lora_weights("out", weight_name="lora.safetensors")
    inputs = (torch.randn(1, 4, 16, 16), 500, torch.randn(1, 4, 32))
    torch.testing.assert_close(adapted.unet(*inputs)[0], merged(*inputs)[0])
    trained = {name for name in changed(folder_weights(source), folder_weights(Path("out/model"))) if "attn2" in name}
    assert trained == changed(folder_weights(source), folder_weights(Path("out/model")))

    drawn = ("--prompts", "a cat", "--config", "nano.yaml")
    succeed("sample", "--model", source, "--lora", "out/lora.safetensors", *drawn, "--out", "with.png")
    succeed("sample", "--model", "out/model", *drawn, "--out", "merged.png")
    with_lora, of_merged = (torch.tensor(list(Image.open(f"{name}.png").tobytes())) for name in ("with", "merged"))
    assert (with_lora - of_merged).abs().max() <= 1


def test_saliency_lets_only_its_share_of_the_weights_move(nano_folder: Folder, photos: Path) -> None:
    source = nano_folder("sd")
    chosen = ("--data", photos, "--forget-class", "cat", "--config", "nano.yaml")
    succeed("unlearn", "--model", source, *chosen, "--out", "out", "--set", "text_to_image.saliency=0.25")
    before, after = folder_weights(source), folder_weights(Path("out/model"))
    trained = [name for name in before if "attn2" in name]
    moved = sum(int((before[name] != after[name]).sum()) for name in trained)
    share = moved / sum(before[name].numel() for name in trained)
    assert 0.2 < share <= 0.26


def test_single_file_and_half_precision(nano_folder: Folder, photos: Path) -> None:
    chosen = ("--data", photos, "--forget-class", "cat", "--config", "nano.yaml")
    written = ("--set", "output.layout=single-file", "--set", "output.dtype=float16")
    succeed("unlearn", "--model", nano_folder("sd"), *chosen, "--out", "out", *written)
    assert {tensor.dtype for tensor in load_file("out/model.safetensors").values()} <= {torch.float16, torch.int64}
    theirs = StableDiffusionPipeline.from_single_file("out/model.safetensors", config=str(nano_folder("sd")))
    assert theirs.unet.config.cross_attention_dim == 32
    config = ("--set", f"text_to_image.config={nano_folder('sd')}", "--config", "nano.yaml")
    succeed("sample", "--model", "out/model.safetensors", "--prompts", "a dog", "--out", "dog.png", *config)
    succeed("unlearn", "--model", "out/model.safetensors", *chosen, "--out", "again", *config)


def test_encoders_leave_memory_before_training(nano_folder: Folder, photos: Path, here: Path) -> None:
    settings = {
        "unlearn.model": nano_folder("sdxl"),
        "images.data": str(photos),
        "images.forget_phrases": ["cat"],
        "unlearn.target": "relabel",
        "text_to_image.anchor_prompts": ["a dog"],
    }
    before = alive(AutoencoderKL)
    session = build_unlearning_job(load_config(here / "nano.yaml", settings))
    assert alive(AutoencoderKL) <= before
    list(session.trial_steps(1))


def test_a_dry_run_plans_and_writes_nothing(
    nano_folder: Folder, photos: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("unlearn", "--model", nano_folder("flux"), "--data", photos, "--forget-class", "cat")
    succeed(*command, "--config", "nano.yaml", "--dry-run", "--json")
    plan = json.loads(capsys.readouterr().out)
    assert 0 < plan["parameters_trained"] < plan["parameters"]
    assert plan["state_bytes"] == 4 * (plan["parameters"] + 2 * plan["parameters_trained"])
    assert [path.name for path in here.iterdir()] == ["nano.yaml"]


def test_a_killed_run_resumed_ends_with_the_same_bits(nano_folder: Folder, photos: Path, here: Path) -> None:
    begin = [
        *("unlearn", "--model", nano_folder("sdxl"), "--data", photos, "--forget-class", "cat"),
        *("--config", "nano.yaml", "--steps", 16, "--barrier", "gap", "--train", "xattn-kv"),
        # On a GPU, attention's backward pass adds up in no fixed order.
        *("--target", "relabel", "--anchor-prompts", "a dog;a bird", "--device", "cpu"),
        *("--set", "text_to_image.saliency=0.5", "--set", "unlearn.ema_decay=0.9", "--set", "run.checkpoint_every=4"),
    ]
    succeed(*begin, "--out", "whole")
    assert {name for name in load_file("whole/checkpoint-16/state.safetensors") if "resnets" in name} == set()

    command = [sys.executable, "-m", "erasediff.cli", *map(str, begin), "--out", "killed"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + SECONDS_TO_WAIT
    metrics = here / "killed/metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 6:
        assert killed.poll() is None, killed.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    _, told = killed.communicate()
    assert "transformers" not in told, "of libraries nothing is told that the user cannot use"
    assert not (here / "killed/model").exists()

    succeed("unlearn", "--resume", "latest", "--out", "killed")
    assert contents(here / "killed") == contents(here / "whole")


def test_usual_values_fit_the_kind_of_model_and_what_is_set_stays() -> None:
    assert for_text_to_image(Config()).unlearn.lr == 1e-5
    assert for_text_to_image(Config(), weights=2_600_000_000).unlearn.lr == 1e-5
    assert for_text_to_image(Config(), weights=1_000_000).unlearn.lr == 5e-4
    assert for_text_to_image(load_config(None, {"text_to_image.train": "lora"})).unlearn.lr == 1e-4
    config = for_text_to_image(load_config(None, {"unlearn.lr": 5e-4, "threads": 1}))
    assert (config.unlearn.lr, config.threads, config.unlearn.ema_decay) == (5e-4, 1, None)
    assert for_text_to_image(config) == config

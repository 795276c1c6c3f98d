"""User errors with a text-to-image checkpoint or its images: one sentence, exit code 2, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import run_command, succeed
from PIL import Image

from erasediff.models import PixelModel, lora
from erasediff.models.load import load_text_to_image
from erasediff.models.trainable import select

pytestmark = pytest.mark.usefixtures("one_thread")
Folder = Callable[[str], Path]
SETTINGS = "threads: 1\nimages: {height: 32, width: 32, bucket_step: 16}\nunlearn: {steps: 1, batch_size: 2}\n"


def edited(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def photos(folder: Path, *, captions: bool = True) -> Path:
    for name in ("cat/0.png", "dog/1.png"):
        path = folder / name
        path.parent.mkdir(parents=True)
        Image.new("RGB", (32, 32), "red" if "cat" in name else "blue").save(path)
        if captions:
            path.with_suffix(".txt").write_text(f"a {path.parent.name}")
    return folder


@pytest.fixture(scope="module")
def home(nano_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint ``sd``, broken ones, images with and without faults, and what else is easily mixed up."""
    home = tmp_path_factory.mktemp("home")
    (home / "nano.yaml").write_text(SETTINGS)
    for name in ("sd", "no-vae", "wider", "contradicting", "pickled", "no-extractor", "dangling"):
        shutil.copytree(nano_folder("sd"), home / name)
    shutil.rmtree(home / "no-vae/vae")
    edited(home / "wider/unet/config.json", cross_attention_dim=48)
    edited(
        home / "contradicting/scheduler/scheduler_config.json", prediction_type="epsilon", rescale_betas_zero_snr=True
    )
    edited(home / "no-extractor/model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"])
    (home / "dangling/tokenizer/notes.txt").symlink_to("absent")
    weights = home / "pickled/unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    (home / "flux").symlink_to(nano_folder("flux"))
    (home / "model.ckpt").write_bytes(b"\x80\x04.")
    (home / "nothing").mkdir()

    unet: Any = load_text_to_image(nano_folder("sdxl")).denoiser
    lora.add(unet, rank=1, targets=select(unet, "xattn"))
    lora.save(unet, home / "sdxl-lora.safetensors", family="sdxl")
    PixelModel.build(num_classes=10, seed=0, block_out_channels=(8, 8), layers_per_block=1).save(home / "digits")

    photos(home / "photos")
    photos(home / "silent", captions=False)
    (photos(home / "empty") / "dog/1.png").write_bytes(b"")
    whole = (photos(home / "cut") / "dog/1.png").read_bytes()
    (home / "cut/dog/1.png").write_bytes(whole[: len(whole) // 2])
    twice = photos(home / "twice")
    shutil.copy(twice / "cat/0.png", twice / "dog/0.png")
    (twice / "dog/0.txt").write_text("a dog")
    (photos(home / "links") / "dog/2.png").symlink_to("nowhere.png")
    (home / "request.txt").write_text("cat/7.png\n")
    return home


@pytest.fixture(autouse=True)
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test in a folder of its own, with links to what ``home`` holds; the cache would be there too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ERASEDIFF_CACHE", str(tmp_path / "cache"))
    for path in home.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[object, str]:
    """Exit code, and the error stream without what came before the error."""
    code = run_command(*arguments, "--config", "nano.yaml")
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, "Error: " + captured.err.partition("Error: ")[2].strip()


SD = ("unlearn", "--model", "sd", "--out", "out")
SAMPLE = ("sample", "--model", "sd", "--prompts", "a cat", "--out", "out")
KOHYA = ("--set", "output.lora_keys=kohya")
CATS = ("--data", "photos", "--forget-class", "cat")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("unlearn", "--model", "nothing", "--out", "out", *CATS), "has no model_index.json"),
        (("unlearn", "--model", "sd/unet", "--out", "out", *CATS), "one component of a model"),
        (("unlearn", "--model", "no-vae", "--out", "out", *CATS), "no-vae/vae"),
        (("unlearn", "--model", "no-extractor", "--out", "out", *CATS), "no folder no-extractor/feature_extractor"),
        (("unlearn", "--model", "no-extractor", *CATS, "--dry-run"), "no folder no-extractor/feature_extractor"),
        (
            ("unlearn", "--model", "dangling", "--out", "out", *CATS),
            "dangling/tokenizer/notes.txt cannot be read: it is a link",
        ),
        (
            ("unlearn", "--model", "sd", "--out", "model.ckpt/run", *CATS),
            "Cannot write model.ckpt/run: not a directory",
        ),
        (("unlearn", "--model", "sd", "--out", "model.ckpt/run", *CATS, "--dry-run"), "Cannot write model.ckpt/run"),
        (("unlearn", "--model", "wider", "--out", "out", *CATS), "does not fit its configuration"),
        (("unlearn", "--model", "contradicting", "--out", "out", *CATS), "contradicts its network"),
        (("unlearn", "--model", "pickled", "--out", "out", *CATS), "convert them"),
        (("unlearn", "--model", "model.ckpt", "--out", "out", *CATS), "model.ckpt is a pickle"),
        (("unlearn", "--model", "absent.safetensors", "--out", "out", *CATS), "does not exist"),
        (("unlearn", "--model", "nobody/nothing", "--out", "out", *CATS), "check the name, the connection"),
        ((*SD, *CATS, "--lora", "sdxl-lora.safetensors"), "is a LoRA for another model"),
        ((*SD, *CATS, "--lora", "absent.safetensors"), "absent.safetensors cannot be read"),
        ((*SD, "--data", "silent", "--forget-class", "cat"), "no caption"),
        ((*SD, "--data", "empty", "--forget-class", "cat"), "dog/1.png is empty: the file has no bytes"),
        (
            (*SD, "--data", "twice", "--forget-class", "cat"),
            "share 1 of 1 forgotten images: twice/cat/0.png is also twice/dog/0.png",
        ),
        ((*SD, "--data", "links", "--forget-class", "cat"), "links/dog/2.png is no file"),
        (
            ("unlearn", "--model", "no-vae", "--out", "out", "--data", "photoz", "--forget-class", "cat"),
            "There is no folder photoz: did you mean photos?",
        ),
        ((*SD, "--data", "absent", "--forget-class", "cat"), "absent"),
        ((*SD, "--data", "photos", "--forget-class", "cart"), "choose from cat"),
        ((*SD, "--data", "photos", "--forget-phrase", "bird"), "No caption has 'bird' in it"),
        ((*SD, "--data", "photos", "--forget-files", "request.txt"), "cat/7.png is no image of the data"),
        ((*SD, "--data", "photos"), "Nothing to forget"),
        (SD, "Nothing to forget"),
        ((*SD, "--data", "photos", "--forget-phrase", "a"), "Nothing is left to retain"),
        ((*SD, "--forget-prompts", "a cat"), "Nothing is left to retain"),
        ((*SD, "--forget-prompts", ";"), "There is no prompt"),
        ((*SD, "--forget", "3"), "--forget-class"),
        ((*SD, *CATS, "--train", "xatn"), "did you mean xattn?"),
        ((*SD, *CATS, "--train", "re:attn3"), "matches no weight of this model"),
        ((*SD, *CATS, "--train", "lora", "--set", "text_to_image.saliency=0.5"), "Saliency"),
        ((*SD, *CATS, "--set", "text_to_image.attention=xformers"), "Attention cannot run this way"),
        ((*SD, *CATS, "--set", "images.height=33"), "give multiples of"),
        ((*SD, *CATS, "--set", "images.bucket_step=64"), "smaller than the bucket step"),
        ((*SD, *CATS, "--set", "images.hight=32"), "did you mean images.height"),
        (("unlearn", "--model", "sd", "--out", "photos", *CATS), "is not empty"),
        (("unlearn", "--model", "flux", "--out", "out", *CATS, "--set", "output.layout=single-file"), "no single-file"),
        (
            ("unlearn", "--model", "flux", "--out", "out", *CATS, "--train", "lora", *KOHYA),
            "no kohya keys here",
        ),
        (("unlearn", "--model", "digits", "--out", "out", "--forget", "3", "--data", "photos"), "There is no class 3"),
        (("sample", "--model", "digits", "--prompts", "a cat", "--out", "out"), "omit --prompts"),
        (("sample", "--model", "sd", "--out", "out"), "--prompts"),
        ((*SAMPLE, "--set", "sample.num_inference_steps=5000"), "more than the 1,000 timesteps"),
        (("sample", "--model", "sd", "--prompts", "a cat", "--out", "photos"), "photos exists already"),
        (("sample", "--model", "sd", "--prompts", "a cat", "--out", "photos/cat/0.png"), "0.png exists already"),
        (("train", "--out", "photos/cat/0.png"), "is no folder that results can be written to"),
        (("sample", "--model", "sd", "--prompts", "a cat", "--classes", "3", "--out", "out"), "--prompts"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], here: Path, command: tuple[str, ...], said: str
) -> None:
    before = sorted(path.name for path in here.iterdir())
    code, sentence = told(capsys, *command)
    assert code == 2
    assert said in sentence
    assert sentence.count("\n") == 0
    assert sorted(path.name for path in here.iterdir()) == before


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
def test_a_disk_without_room_is_told_before_anything_is_encoded(
    capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch, dry_run: tuple[str, ...]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    code, sentence = told(capsys, *SD, *CATS, *dry_run)
    assert code == 2
    assert "The model and the checkpoints of this run need about" in sentence
    assert not (here / "out").exists()
    assert not (here / "cache").exists()


def test_an_image_that_ends_too_soon_is_named(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    """It is seen when it is decoded; what was encoded before it is kept in the cache."""
    code, sentence = told(capsys, *SD, "--data", "cut", "--forget-class", "cat")
    assert code == 2
    assert "dog/1.png is broken" in sentence
    assert not (here / "out").exists()


def test_a_broken_image_is_skipped_by_name_when_asked(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    shutil.copytree(here / "photos", here / "mended")
    (here / "mended/dog/2.png").write_bytes(b"")
    (here / "mended/dog/2.txt").write_text("a dog")
    command = ["unlearn", "--model", "sd", "--data", "mended", "--forget-class", "cat", "--out", "out", "--skip-broken"]
    succeed(*command, "--config", "nano.yaml")
    assert "mended/dog/2.png is empty" in capsys.readouterr().err

"""Command lines: argv made of the real options of every command, with values that are rarely meant."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from harness import command, fuzzed, tree
from hypothesis import strategies as st
from mutations import LONG_NAME, WORDS
from seeds import make_images, make_loras

from erasediff.cli.main import app

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
NUMBERS = ("0", "1", "2", "-1", "3", "1e3", "0.5", "nan", "inf", "-inf", "1e400", "", "1_0", "0x1", "٣", "9" * 400)
HUGE = ("1000000000000", "9223372036854775807", "9223372036854775808", "-9223372036854775809", "4294967296")
PLACES = (
    *("net", "sd", "images", "lora.safetensors", "absent", "file", "pipe", "loop", "empty", "/dev/null", "/dev/zero"),
    *("..", ".", "/", "~", LONG_NAME, f"a/{LONG_NAME}", "x\ny", "é", "out", "file/x", "a.png", "a.psd", "x.ckpt"),
)
TEXTS = (
    *(word for word in WORDS if "\ud800" not in word),
    "cat",
    "a cat;a dog",
    ";",
    "3",
    "3,5",
    ",",
    "cat,dog",
    "digits",
)
DEVICES = ("cpu", "cuda", "cuda:9", "meta", "hpu", "mps", "cpu:0", "cpu:7", "xla", "", "gpu", "privateuseone")
CHOICES = (
    "none",
    "ddp",
    "fsdp",
    "zero",
    "all",
    "needed",
    "full",
    "xattn",
    "lora",
    "re:",
    "re:(",
    "relabel",
    "norm",
    "esd",
)
ASSIGNMENTS = (
    *("sample.num_inference_steps=5000", "sample.num_inference_steps=101", "unlearn.relabel_to=[]", "images.height=33"),
    *("images.bucket_step=7", "threads=2147483647", "model.block_out_channels=[]", "seed=.nan"),
    *("model.block_out_channels=[8,8,8,8,8,8,8]", "model.block_out_channels=[7]", "model.layers_per_block=2147483647"),
    *("model.num_train_timesteps=1", "unlearn.accumulation_steps=2147483647", "train.batch_size=2147483647"),
    *(
        "images.encode_batch_size=2147483647",
        "images.images_per_prompt=2147483647",
        "text_to_image.lora_rank=2147483647",
    ),
    *(
        "text_to_image.saliency=1.0e-300",
        "output.max_shard_bytes=1",
        "unlearn.batch_size=2147483647",
        "text_to_image.train=",
    ),
    *(
        "data.exclude=[0,1,2,3,4,5,6,7,8,9]",
        "unlearn.retain=[]",
        "unlearn.forget=[99]",
        "unlearn.method=nothing",
        "=",
        "a",
    ),
    *("unlearn.lr=1.0e+308", "unlearn.eta=1.0e-320", "images.caption_template='{'", "images.caption_template='{a.b}'"),
    *("images.caption_template='{class!z}'", "images.split=''", "model.num_train_timesteps=2147483647", "device=meta"),
    *("unlearn.inner_steps=2147483647", "run.checkpoint_every=2147483647", "distributed.timeout=1.0e-300"),
)

FEW = ("--set", "sample.num_inference_steps=1", "--set", "images.images_per_prompt=1")
SHORT_RUN = ("--data", "images", "--forget-class", "cat", "--out", "out", "--steps", "1", "--batch-size", "2")
RIGHT = {
    "train": (("--out", "out", "--steps", "1", "--batch-size", "2"),),
    "unlearn": (
        ("--model", "net", *SHORT_RUN),
        ("--model", "sd", *SHORT_RUN),
        ("--model", "sd", "--forget-prompts", "a", "--retain-prompts", "b", "--out", "out", "--steps", "1", *FEW),
    ),
    "sample": (
        ("--model", "net", "--out", "out", "--count", "1", "--set", "sample.num_inference_steps=1"),
        ("--model", "sd", "--out", "out", "--prompts", "a", "--set", "sample.num_inference_steps=1"),
    ),
    "evaluate": (("--model", "net", "--forget", "0"),),
    "scan": (("sd", "--prompts", "a", "--control", "b;c", "--out", "out", "--count", "1"),),
    "plan": (("--model", "net", "--ranks", "1"), ("--model", "sd", "--ranks", "1")),
    "mask": (("--model", "sd", "--mask", "lora.safetensors", "--out", "out"),),
    "info": ((),),
}
"""Arguments with which a command works in seconds; demo, compare and bench take minutes, and unlearn's flags."""


def _value(option: Any) -> st.SearchStrategy[str]:
    if option.name == "device":
        return st.sampled_from(DEVICES)
    if option.name == "settings":
        return st.sampled_from(ASSIGNMENTS)
    if option.bare_type in (int, float):
        return st.sampled_from((*NUMBERS, *HUGE))
    if option.bare_type is Path or option.name in ("data", "forget_data", "model", "resume"):
        return st.sampled_from(PLACES)
    return st.sampled_from((*TEXTS, *NUMBERS, *PLACES, *CHOICES))


def _arguments(name: str) -> st.SearchStrategy[tuple[str, ...]]:
    options = [parameter for parameter in COMMANDS[name].params if parameter.param_type_name == "option"]
    given = st.sampled_from([option for option in options if option.name != "help"]).flatmap(
        lambda option: (
            st.just((option.opts[0],)) if option.is_flag else _value(option).map(lambda value: (option.opts[0], value))
        )
    )
    odd = st.lists(given, min_size=1, max_size=3).map(lambda found: tuple(part for pair in found for part in pair))
    right = st.sampled_from(RIGHT.get(name, ((),)))
    return st.builds(lambda *parts: (name, *parts[0], *parts[1]), right, odd)


lines = st.sampled_from(sorted(RIGHT)).flatmap(_arguments)


@pytest.fixture
def home(place: Path, nano_folder: Callable[[str], Path]) -> Path:
    """What the arguments name."""
    (place / "net").symlink_to(nano_folder("ddpm_unconditional"))
    (place / "sd").symlink_to(nano_folder("sd"))
    make_images(place / "images")
    loras = make_loras(nano_folder("sd"), place / "loras")
    (loras / "kohya.safetensors").rename(place / "lora.safetensors")
    (place / "file").write_text("a")
    (place / "empty").mkdir()
    (place / "loop").symlink_to("loop")
    os.mkfifo(place / "pipe")
    return place


@fuzzed(60, line=lines)
def test_command_lines(line: tuple[str, ...], home: Path) -> None:
    """Taken or refused; refused, nothing is written. Runs are rehearsed instead of made."""
    rehearsed = ("--dry-run",) if line[0] in ("train", "unlearn") else ()
    before = tree(home)
    ended = command(*line, *rehearsed)
    after = tree(home)
    written = {path for path in after.keys() | before.keys() if after.get(path) != before.get(path)}
    outside_cache = {path for path in written if not path.startswith(str(home / "cache"))}
    if ended.code or rehearsed:
        assert not outside_cache, (ended, outside_cache)
    for path in sorted(outside_cache, reverse=True):
        if Path(path).is_dir():
            Path(path).rmdir()
        else:
            Path(path).unlink(missing_ok=True)

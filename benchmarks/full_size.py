"""Stable Diffusion 1.5, 2.1 and SDXL at their real sizes, with random weights, as a user has them on the disk.

``python benchmarks/full_size.py make sd15 --out DIR`` writes a diffusers folder (or, with ``--single-file``, one file).
``python benchmarks/full_size.py round-trip DIR`` loads it, saves it both ways, compares every tensor's bits with the
input's, and appends seconds and peak memory to ``results/full_size.jsonl``. ``... step DIR`` appends what
``erasediff unlearn`` plans for it and, with ``--real``, what one real step takes; both are whole runs of the command.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

from erasediff.io.tensor_file import StoredTensor, TensorFile
from erasediff.models.checkpoint.base import write_small_files
from erasediff.models.checkpoint.components import empty_module
from erasediff.models.checkpoint.default_configs import KNOWN_CONFIGS
from erasediff.models.checkpoint.save import save_folder, save_single_file
from erasediff.models.load import load_text_to_image

LAYOUTS = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}
V_PREDICTION = ("sd2", "scheduler")
RESULTS = Path(__file__).parent / "results" / "full_size.jsonl"
app = typer.Typer(add_completion=False, help=__doc__)


class RandomCheckpoint:
    """A ``Checkpoint`` of a known family; each weight is drawn, from its name, when it is written."""

    metadata: dict[str, str]
    original: dict[str, StoredTensor]

    def __init__(self, layout: str, dtype: torch.dtype) -> None:
        self.layout = layout
        self.path = Path(layout)
        self.configs = KNOWN_CONFIGS[layout]
        self.index = self.configs["index"]
        self.dtype = dtype
        self.metadata, self.original = {}, {}

    def config(self, component: str) -> dict[str, Any]:
        config = self.configs[component]
        return {**config, "prediction_type": "v_prediction"} if (self.layout, component) == V_PREDICTION else config

    def tensors(self, component: str) -> dict[str, StoredTensor]:
        return {
            name: self._drawn(component, name, tuple(tensor.shape))
            for name, tensor in empty_module(self, component).state_dict().items()
        }

    def _drawn(self, component: str, name: str, shape: tuple[int, ...]) -> StoredTensor:
        def load() -> Tensor:
            if len(shape) == 1:
                return torch.full(shape, float(name.endswith("weight")), dtype=self.dtype)
            generator = torch.Generator().manual_seed(zlib.crc32(f"{component}.{name}".encode()))
            return (torch.randn(shape, generator=generator) * prod(shape[1:]) ** -0.5).to(self.dtype)

        return StoredTensor(self.dtype, shape, load)

    def tokenizer(self, component: str) -> CLIPTokenizer:
        """As many tokens as CLIP has, of which only the single characters are ever met."""
        characters = [chr(code) for code in range(33, 127)]
        words = [*characters, *(f"{character}</w>" for character in characters)]
        size = self.configs["text_encoder"]["vocab_size"]
        words += [f"<|{number}|>" for number in range(size - 2 - len(words))]
        vocabulary = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
        return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)

    def header(self, component: str) -> dict[str, str]:
        return {"format": "pt"}

    def copy_small_files(self, folder: Path) -> None:
        write_small_files(self, folder)


@app.command()
def make(
    model: Annotated[str, typer.Argument(help=f"One of {', '.join(LAYOUTS)}.")],
    out: Annotated[Path, typer.Option(help="The folder, or the .safetensors file.")],
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float16",
    single_file: Annotated[bool, typer.Option("--single-file", help="One file in the original layout.")] = False,
) -> None:
    """Write a checkpoint with random weights."""
    checkpoint = RandomCheckpoint(LAYOUTS[model], getattr(torch, dtype))
    common: dict[str, Any] = {"trained": {}, "metadata": {"format": "pt"}, "dtype": None, "replace": True}
    if single_file:
        save_single_file(checkpoint, out, layout=LAYOUTS[model], markers={}, **common)
    else:
        save_folder(checkpoint, out, max_shard_size=10_000_000_000, **common)


@app.command()
def round_trip(
    folder: Annotated[Path, typer.Argument(help="What `make` wrote as a folder.")],
    scratch: Annotated[Path | None, typer.Option(help="Where the copies go.")] = None,
) -> None:
    """Folder -> folder and folder -> single file -> folder, bit by bit, with the denoiser loaded in bfloat16."""
    gib = round(sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 2**30, 2)
    line: dict[str, Any] = {"what": "round trip", "model": folder.name, "gib": gib, **circumstances()}
    with tempfile.TemporaryDirectory(dir=scratch) as temporary, PeakMemory() as peak:
        first, single, second = (Path(temporary, name) for name in ("first", "model.safetensors", "second"))
        begun = time.perf_counter()
        model = load_text_to_image(folder, dtype=torch.bfloat16)
        line["load_seconds"] = lap(begun)
        begun = time.perf_counter()
        model.save(first)
        line["save_folder_seconds"] = lap(begun)
        line["folder_identical"] = identical(folder, first)
        shutil.rmtree(first)
        begun = time.perf_counter()
        model.save(single, layout="single-file")
        line["save_single_file_seconds"] = lap(begun)
        del model
        load_text_to_image(single, config=folder, dtype=torch.bfloat16).save(second)
        line["single_file_identical"] = identical(folder, second)
    line["peak_gib"] = round(peak.kib / 2**20, 2)
    keep(line)
    if not (line["folder_identical"] and line["single_file_identical"]):
        raise typer.Exit(1)


@app.command()
def step(
    folder: Annotated[Path, typer.Argument(help="What `make` wrote as a folder.")],
    size: Annotated[int, typer.Option(help="Pixels of each side; the latents are an eighth of it.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Retained samples, and as many forgotten ones.")] = 1,
    weights: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    real: Annotated[bool, typer.Option("--real", help="Also take one step and save the model.")] = False,
) -> None:
    """Plan an unlearning of the cross-attentions, and compare a real step's peak memory with the plan's."""
    settings = {
        "images.height": size,
        "images.width": size,
        "images.bucket_step": "null",
        "images.encode_batch_size": batch_size,
        "text_to_image.train": "xattn",
        "text_to_image.weights": weights,
        "unlearn.batch_size": batch_size,
        "unlearn.steps": 1,
    }
    with tempfile.TemporaryDirectory() as temporary:
        images = Path(temporary, "images")
        for kind in ("forgotten", "retained"):
            write_images(images / kind, kind, size, batch_size)
        command = [
            sys.executable,
            "-m",
            "erasediff.cli",
            "unlearn",
            "--no-verdict",
            "--model",
            str(folder),
            "--data",
            str(images),
        ]
        command += ["--forget-class", "forgotten", "--json"]
        command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        plan, _, _ = run([*command, "--dry-run"], temporary)
        line: dict[str, Any] = {
            "what": "step",
            "model": folder.name,
            "settings": settings,
            **circumstances(),
            "plan": plan,
        }
        if real:
            _, line["peak_bytes"], line["seconds"] = run([*command, "--out", str(Path(temporary, "run"))], temporary)
            line["real_to_plan"] = round(line["peak_bytes"] / plan["peak_bytes"], 4)
    keep(line)


def circumstances() -> dict[str, Any]:
    return {
        "load": round(os.getloadavg()[0], 1),
        "versions": {library: version(library) for library in ("torch", "diffusers", "transformers")},
    }


def keep(line: dict[str, Any]) -> None:
    """Append ``line`` to the results, and show it."""
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line, indent=2))


def write_images(folder: Path, caption: str, size: int, count: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        seed = zlib.crc32(f"{caption}.{number}".encode())
        pixels = torch.randint(256, (size, size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a photo of the {caption}")


def run(command: list[str], cache: str) -> tuple[dict[str, Any], int, float]:
    """Output of the command, its peak memory in bytes, and its seconds."""
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "ERASEDIFF_CACHE": cache}) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise typer.Exit(process.returncode)
    return json.loads(printed), usage.ru_maxrss * 1024, lap(begun)


class PeakMemory:
    """The most that the process itself held, in KiB; mapped files, which can be dropped at any time, are left out."""

    def __init__(self) -> None:
        self.kib = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            status = Path("/proc/self/status").read_text()
            self.kib = max(self.kib, int(status.split("RssAnon:")[1].split()[0]))


def identical(own: Path, theirs: Path) -> bool:
    """Whether the weights of two diffusers folders are the same, names of text encoders apart."""
    pairs = zip(weights(own), weights(theirs), strict=True)
    return all(
        name == other and left.dtype == right.dtype and torch.equal(left.load(), right.load())
        for (name, left), (other, right) in pairs
    )


def weights(folder: Path) -> Iterator[tuple[str, StoredTensor]]:
    found = {
        f"{path.parent.name}/{name.removeprefix('text_model.')}": tensor
        for path in folder.glob("*/*.safetensors")
        for name, tensor in TensorFile.open(path).tensors.items()
    }
    return iter(sorted(found.items()))


def lap(begun: float) -> float:
    return round(time.perf_counter() - begun, 1)


if __name__ == "__main__":
    app()

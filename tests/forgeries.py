"""Forged runs: ways to change what a run delivers or claims, each with the name that a verification must tell."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from erasediff.errors import UserError
from erasediff.provenance.canonical import canonical_json, content_sha256
from erasediff.provenance.digests import describe_files
from erasediff.provenance.run_figures import run_figures
from erasediff.provenance.run_files import covered_files

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
TRAINED = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
FROZEN = "conv_in.weight"
SAME_SHAPE = (TRAINED, TRAINED.replace("to_k", "to_v"))


@dataclass(frozen=True, slots=True)
class Place:
    """A run to forge, beside what it read: ``run``, the model ``base``, the images ``photos``, and another run."""

    folder: Path

    def __getattr__(self, name: str) -> Path:
        return self.folder / name


@dataclass(frozen=True, slots=True)
class Forgery:
    """A way to forge a run.

    Attributes:
        kind: What is forged.
        forge: Does it.
        named: Text that one of the faults must begin with.
    """

    kind: str
    forge: Callable[[Place], None]
    named: str


def receipt_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "receipt.json").read_bytes())
    return content


def seal(run: Path, change: Callable[[dict[str, Any]], None] = lambda receipt: None, *, files: bool = False) -> None:
    """Change a receipt and hash it anew; with ``files``, also all that a forger can hash without a word of the run."""
    receipt = receipt_of(run)
    if files:
        receipt["files"] = describe_files(covered_files(run))
        with suppress(UserError):
            receipt["figures"] = run_figures(run)
        found = receipt["files"]
        receipt["evidence"] = {name: found[name]["sha256"] if name in found else None for name in receipt["evidence"]}
    change(receipt)
    (run / "receipt.json").write_bytes(canonical_json(receipt | {"sha256": content_sha256(receipt)}))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{path} has no {old!r}"
    path.write_text(text.replace(old, new, 1))


def flip_bit(path: Path, name: str, *, element: int = 0, bit: int = 0) -> None:
    """Flip one bit of a tensor, in place."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    begin, _ = json.loads(content[8 : 8 + length])[name]["data_offsets"]
    content[8 + length + begin + 4 * element + bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def swap_tensors(path: Path, one: str, other: str) -> None:
    tensors = load_file(path)
    tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()
    save_file(tensors, path, metadata={"format": "pt"})


def change_tensors(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def deliver_base(place: Place) -> None:
    shutil.rmtree(place.run / "model")
    shutil.copytree(place.base, place.run / "model")


def sealed(forge: Callable[[Place], None]) -> Callable[[Place], None]:
    def both(place: Place) -> None:
        forge(place)
        seal(place.run, files=True)

    return both


def on(path: str, change: Callable[..., None], *arguments: Any, **options: Any) -> Callable[[Place], None]:
    """``change`` of the file ``path`` of a place."""
    return lambda place: change(place.folder / path, *arguments, **options)


def restated(*keys: str, value: Any) -> Callable[[Place], None]:
    """Another ``value`` in the receipt, hashed anew."""

    def change(receipt: dict[str, Any]) -> None:
        for key in keys[:-1]:
            receipt = receipt[key]
        assert receipt[keys[-1]] != value
        receipt[keys[-1]] = value

    return lambda place: seal(place.run, change)


def unsealed(old: str, new: str) -> Callable[[Place], None]:
    return on("run/receipt.json", edit, old, new)


def truncate(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def without_line(path: Path, number: int = 0) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:number] + lines[number + 1 :]))


def add(path: Path, content: bytes = b"x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def repaint(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def forgeries() -> Iterator[Forgery]:
    """All kinds, sorted by them."""
    yield from _models()
    yield from _tensors()
    yield from _files()
    yield from _settings()
    yield from _lines()
    yield from _claims()
    yield from _inputs()


def _models() -> Iterator[Forgery]:
    kind = "unmodified model"
    yield Forgery(kind, deliver_base, f"model/{UNET}, tensor {TRAINED}")
    yield Forgery(kind, sealed(deliver_base), "model: expected another model than the one it was unlearned from")

    def claimed(place: Place) -> None:
        sealed(deliver_base)(place)
        seal(place.run, lambda receipt: receipt["moves"].update(moved={}, l2=0.0))

    yield Forgery(kind, claimed, "model: expected another model than the one it was unlearned from")
    kind = "model of another run"

    def other(place: Place) -> None:
        shutil.rmtree(place.run / "model")
        shutil.copytree(place.other / "model", place.run / "model")

    yield Forgery(kind, other, f"model/{UNET}, tensor {TRAINED}")
    yield Forgery(kind, sealed(other), f"moves, moved, unet.{TRAINED}")
    for name in ("receipt.json", "config.yaml", "forget.jsonl", "retain.jsonl", "metrics.jsonl"):
        named = "model/" if name == "receipt.json" else name
        if name not in ("forget.jsonl", "retain.jsonl"):
            copied = on("", lambda folder, name: shutil.copy(folder / "other" / name, folder / "run" / name), name)
            yield Forgery("part of another run", copied, named)


def _tensors() -> Iterator[Forgery]:
    kind = "flipped bit"
    unet, text = f"run/model/{UNET}", f"run/model/{TEXT}"
    frozen = ("conv_in.bias", "conv_out.weight", "time_embedding.linear_1.weight", "mid_block.resnets.0.conv1.weight")
    for number, name in enumerate((TRAINED, SAME_SHAPE[1], FROZEN, *frozen)):
        for bit in (0, 31):
            flip = on(unet, flip_bit, name, element=number, bit=bit)
            yield Forgery(kind, flip, f"model/{UNET}, tensor {name}")
            if bit == 31:
                yield Forgery(f"{kind}, hashed anew", sealed(flip), f"moves, moved, unet.{name}")
    for name in ("final_layer_norm.weight", "embeddings.position_embedding.weight"):
        yield Forgery(kind, on(text, flip_bit, name, bit=7), f"model/{TEXT}, tensor {name}")
    vae = "vae/diffusion_pytorch_model.safetensors"
    flip = on(f"run/model/{vae}", flip_bit, "encoder.conv_in.weight", bit=12)
    yield Forgery(kind, flip, f"model/{vae}, tensor encoder.conv_in.weight")
    kind = "swapped tensors"
    swap = on(unet, swap_tensors, *SAME_SHAPE)
    yield Forgery(kind, swap, f"model/{UNET}, tensor {SAME_SHAPE[0]}")
    yield Forgery(kind, sealed(swap), f"moves, moved, unet.{SAME_SHAPE[0]}")
    swap = on(unet, swap_tensors, *(f"mid_block.resnets.{number}.conv1.weight" for number in (0, 1)))
    yield Forgery(kind, swap, f"model/{UNET}, tensor mid_block.resnets.1.conv1.weight")
    yield Forgery(kind, sealed(swap), "moves, moved, unet.mid_block.resnets.0.conv1.weight")
    kind = "other tensors"
    for change, named, moved in (
        (lambda t: t.pop(FROZEN), f", tensor {FROZEN}: expected", "moves, removed"),
        (lambda t: t.update(extra=torch.zeros(3)), ", tensor extra: expected nothing", "moves, added"),
        (lambda t: t.update({FROZEN: t[FROZEN].half()}), f", tensor {FROZEN}", "moves, moved"),
        (lambda t: t.update({TRAINED: t[TRAINED] * 1.001}), f", tensor {TRAINED}", f"moves, moved, unet.{TRAINED}"),
    ):
        yield Forgery(kind, on(unet, change_tensors, change), f"model/{UNET}{named}")
        yield Forgery(kind, sealed(on(unet, change_tensors, change)), moved)


def _files() -> Iterator[Forgery]:
    kind = "removed file"
    components = ("model_index.json", UNET, TEXT, "unet/config.json", "scheduler/scheduler_config.json")
    names = [f"model/{name}" for name in components]
    for name in (*names, "config.yaml", "metrics.jsonl", "forget.jsonl", "retain.jsonl", "verdict.json"):
        yield Forgery(kind, on(f"run/{name}", Path.unlink), f"{name}: expected the file, found no such file")
    kind = "added file"
    for name in (
        "model/unet/other.safetensors", "model/unet/diffusion_pytorch_model.bin", "model/vae/readme.txt",
        "lora.safetensors", "old/model.ckpt", "model.safetensors", "model/extra/config.json",
    ):  # fmt: skip
        yield Forgery(kind, on(f"run/{name}", add), f"{name}: expected no such file, found the file")
    kind = "damaged file"
    for share in (0.0, 0.01, 0.5, 0.99):
        yield Forgery(kind, on(f"run/model/{UNET}", truncate, share), f"model/{UNET}")
    config = "model/scheduler/scheduler_config.json"
    yield Forgery(kind, on(f"run/{config}", edit, "epsilon", "sample"), f"{config}, sha256")
    yield Forgery(kind, on("run/model/unet/config.json", edit, "silu", "gelu"), "model/unet/config.json, sha256")


def _settings() -> Iterator[Forgery]:
    kind = "edited configuration"
    for old, new in (("steps: 2", "steps: 2000"), ("lr: 0.001", "lr: 0.1"), ("seed: 0", "seed: 1"), ("cat", "dog")):
        yield Forgery(kind, on("run/config.yaml", edit, old, new), "config.yaml, sha256")
    yield Forgery(kind, sealed(on("run/config.yaml", edit, "seed: 0", "seed: 1")), "seeds, seed")
    yield Forgery(kind, sealed(on("run/config.yaml", edit, "- cat", "- dog")), "forget.jsonl, class: cat")
    renamed = on("run/config.yaml", edit, "/base", "/another")
    yield Forgery(kind, sealed(renamed), "config.yaml, unlearn.model")
    yield Forgery(kind, on("run/config.yaml", truncate, 0.3), "config.yaml")


def _lines() -> Iterator[Forgery]:
    for kind, names in (("edited metrics", ("metrics",)), ("other lists of images", ("forget", "retain"))):
        for name in names:
            file = f"run/{name}.jsonl"
            yield Forgery(kind, on(file, without_line), f"{name}.jsonl, sha256")
            yield Forgery(kind, on(file, truncate, 0.6), f"{name}.jsonl, sha256")
            cut = on(file, truncate, 0.6)
            yield Forgery(kind, lambda place, cut=cut: (cut(place), seal(place.run)), f"{name}.jsonl, sha256")
            yield Forgery(kind, on(file, without_line), f"figures, {name}")
            yield Forgery(kind, on(file, edit, "0", "1"), f"{name}.jsonl, sha256")
    swapped = on("", lambda folder: shutil.copy(folder / "run/retain.jsonl", folder / "run/forget.jsonl"))
    yield Forgery("other lists of images", swapped, "figures, forget, requests")
    kind = "edited verdict"
    recognised, retained = "verdict.json, original, recognised", "verdict.json, original, retained"
    for old, new, named in (
        (
            '"value": 0.0, "low": 0.0, "high": 0.32',
            '"value": 0.0, "low": 0.0, "high": 0.02',
            f"{recognised}, after, high",
        ),
        ('"value": 1.0', '"value": 0.5', f"{recognised}, before, value"),
        ('"count": 8', '"count": 800', f"{recognised}, before, count"),
        ('"value": 0.75', '"value": 1.0', f"{retained}, before, value"),
        ('"limit": 0.03', '"limit": -1', f"{recognised}, is_met"),
        ('"is_met": true', '"is_met": false', f"{recognised}, is_met"),
        ('"verdict": "forgotten', '"verdict": "not forgotten', "verdict.json, verdict"),
        ('"forgotten": "forgotten"', '"forgotten": "not forgotten"', "verdict.json, forgotten"),
        ('"retained": "retained"', '"retained": "damaged"', "verdict.json, retained"),
        ('["cat"]', '["boat"]', "verdict.json, original, re"),
    ):
        change = on("run/verdict.json", edit, old, new)
        yield Forgery(kind, change, "verdict.json, sha256")
        yield Forgery(kind, sealed(change), named)
    seen = on("run/verdict.jsonl", edit, '"after", "asked": "cat", "image": 3, "sees": "boat"',
              '"after", "asked": "cat", "image": 3, "sees": "cat"')  # fmt: skip
    yield Forgery(kind, seen, "verdict.jsonl, sha256")
    yield Forgery(kind, sealed(seen), f"{recognised}, after, value")
    yield Forgery(kind, sealed(on("run/verdict.jsonl", without_line)), f"{recognised}, before, count")
    yield Forgery(kind, sealed(on("run/verdict.jsonl", without_line, 20)), f"{retained}, before, count")
    yield Forgery(kind, sealed(on("run/verdict.json", truncate, 0.5)), "verdict.json: expected what can be read")
    yield Forgery(kind, sealed(on("run/verdict.jsonl", truncate, 0.5)), "figures: expected what can be read")


def _claims() -> Iterator[Forgery]:
    kind = "edited receipt"
    for old, new in (('"seed": 0', '"seed": 5'), ('"torch": "', '"torch": "1'), ('"unlearn"', '"train"')):
        yield Forgery(kind, unsealed(old, new), "receipt.json, sha256")
    yield Forgery(kind, unsealed('"erasediff": "', '"erasediff": "9'), "receipt.json, sha256")
    yield Forgery(kind, unsealed("{\n", "{\n\n"), "receipt.json: expected canonical JSON")
    kind = "edited receipt, hashed anew"
    yield Forgery(kind, restated("seeds", "seed", value=5), "seeds, seed")
    yield Forgery(kind, restated("moves", "l2", value=0.5), "moves, l2")
    yield Forgery(kind, restated("moves", "unmoved", value=1), "moves, unmoved")
    yield Forgery(
        kind, restated("moves", "moved", f"unet.{TRAINED}", "l2", value=1e-9), f"moves, moved, unet.{TRAINED}"
    )
    yield Forgery(
        kind, restated("moves", "moved", f"unet.{TRAINED}", "max", value=9.0), f"moves, moved, unet.{TRAINED}"
    )
    yield Forgery(kind, restated("moves", value=None), "moves, moved")
    yield Forgery(kind, restated("figures", "forget", "images", value=3), "figures, forget, images")
    yield Forgery(kind, restated("figures", "metrics", "last_step", value=2000), "figures, metrics, last_step")
    yield Forgery(kind, restated("figures", "verdict", value=None), "figures, verdict")
    yield Forgery(kind, restated("files", value={}), "model/model_index.json: expected no such file")
    yield Forgery(kind, restated("files", "config.yaml", "sha256", value="0" * 64), "config.yaml, sha256")
    yield Forgery(kind, restated("evidence", "verdict.json", value="0" * 64), "evidence, verdict.json")
    yield Forgery(kind, restated("input", "model", value=None), "receipt.json, input")
    yield Forgery(kind, restated("previous", value=None), "previous receipt")
    yield Forgery(kind, restated("previous", "sha256", value="0" * 64), "previous receipt")


def _inputs() -> Iterator[Forgery]:
    kind = "another base"
    for name in (TRAINED, FROZEN, "conv_out.bias"):
        yield Forgery(kind, on(f"base/{UNET}", flip_bit, name), f"input/{UNET}, tensor {name}")
    yield Forgery(kind, on("base/unet/config.json", edit, "silu", "gelu"), "input/unet/config.json, sha256")
    yield Forgery(
        kind, on("", lambda f: (shutil.rmtree(f / "base"), shutil.copytree(f / "base2", f / "base"))), "input/"
    )
    kind = "another previous receipt"
    yield Forgery(kind, on("receipt.json", edit, '"seed": 0', '"seed": 5'), "previous receipt")
    yield Forgery(kind, on("receipt.json", Path.unlink), "previous receipt")
    kind = "another data set"
    for name in ("cat/0.png", "cat/1.png", "dog/2.png", "dog/4.png"):
        yield Forgery(kind, on(f"photos/{name}", repaint), f"image {name}")
    yield Forgery(kind, on("photos/dog/3.png", Path.unlink), "image dog/3.png: ")
    moved = on("", lambda folder: (folder / "photos/cat/0.png").rename(folder / "photos/cat/9.png"))
    yield Forgery(kind, moved, "image cat/0.png: ")

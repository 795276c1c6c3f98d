"""Patches between checkpoints: applied and reverted bit for bit, small, and only to what they were made for."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nano
import pytest
import torch
from forgeries import UNET, change_tensors, flip_bit
from helpers import run_command, succeed
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from erasediff.errors import UserError
from erasediff.io.tensor_file import DTYPES, tensor_bytes
from erasediff.provenance.apply_patch import apply_patch
from erasediff.provenance.make_patch import PatchSummary, make_patch
from erasediff.provenance.tensor_delta import apply_delta, compress, decompress, delta

TRAINED = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"


def contents(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def made(tmp_path: Path, base: Path, model: Path) -> PatchSummary:
    """A patch that makes the one of the other, in both directions."""
    summary = make_patch(base, model, tmp_path / "patch.safetensors")
    suffix = ".safetensors" if base.is_file() else ""
    apply_patch(base, summary.patch, tmp_path / f"applied{suffix}")
    apply_patch(model, summary.patch, tmp_path / f"reverted{suffix}", revert=True)
    assert contents(tmp_path / f"applied{suffix}") == contents(model)
    assert contents(tmp_path / f"reverted{suffix}") == contents(base)
    return summary


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nano.save("sd", tmp_path_factory.mktemp("patches") / "base")


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    """The base with one tensor trained."""
    shutil.copytree(base, tmp_path / "model")
    change_tensors(tmp_path / "model" / UNET, lambda tensors: tensors[TRAINED].add_(1e-4))
    return tmp_path / "model"


def test_a_patch_holds_what_changed_alone(base: Path, model: Path, tmp_path: Path) -> None:
    summary = made(tmp_path, base, model)
    assert summary.changed == 1
    assert summary.tensors > 200
    assert summary.patch_bytes < 0.1 * summary.model_bytes


def _to(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    "change",
    [
        _to(torch.float16),
        _to(torch.bfloat16),
        _to(torch.float64),
        lambda tensors: tensors.pop(TRAINED),
        lambda tensors: tensors.update(more=torch.zeros(0, 3), one=torch.tensor(3), flag=torch.tensor([True])),
        lambda tensors: tensors.update({TRAINED: tensors[TRAINED].reshape(-1)}),
        lambda tensors: tensors.update({TRAINED: tensors[TRAINED][:2].clone()}),
        lambda tensors: tensors.update({TRAINED: tensors[TRAINED].to(torch.int64)}),
        lambda tensors: tensors[TRAINED].fill_(math.nan),
        lambda tensors: tensors.update({TRAINED: torch.full_like(tensors[TRAINED], math.nan).half()}),
    ],
)
def test_any_change_of_tensors(
    base: Path, model: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    change_tensors(model / UNET, change)
    made(tmp_path, base, model)
    shutil.copy(base / UNET, tmp_path / "one.safetensors")
    shutil.copy(model / UNET, tmp_path / "other.safetensors")
    (tmp_path / "alone").mkdir()
    made(tmp_path / "alone", tmp_path / "one.safetensors", tmp_path / "other.safetensors")


def test_shards_and_small_files(base: Path, tmp_path: Path) -> None:
    sharded = nano.save("sd", tmp_path / "sharded", max_shard_size=60_000)
    assert len(list((sharded / "unet").glob("*-of-*"))) > 1
    (sharded / "README.md").write_text("unlearned")
    (sharded / "model_index.json").write_text((sharded / "model_index.json").read_text() + "\n")
    summary = made(tmp_path, base, sharded)
    assert summary.changed == 0
    # The same tensors in other files are the same base.
    apply_patch(sharded, summary.patch, tmp_path / "back", revert=True)
    shutil.copytree(base, tmp_path / "copy")
    (tmp_path / "copy/tokenizer/tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer/.* is another file"):
        apply_patch(tmp_path / "copy", summary.patch, tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: flip_bit(path, TRAINED), f"unet/{TRAINED} is another tensor"),
        (lambda path: flip_bit(path, "conv_in.bias"), r"unet/conv_in\.bias is another tensor"),
        (lambda path: change_tensors(path, lambda t: t.pop("conv_out.bias")), r"unet/conv_out\.bias is missing"),
        (lambda path: change_tensors(path, lambda t: t.update(a=torch.zeros(1))), r"unet/a is not in it"),
        (lambda path: change_tensors(path, lambda t: t.update({"conv_in.bias": t["conv_in.bias"].half()})), "conv_in"),
    ],
)
def test_another_base_or_model_is_refused_by_its_first_tensor(
    base: Path, model: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    summary = make_patch(base, model, tmp_path / "patch.safetensors")
    other = shutil.copytree(base, tmp_path / "other")
    change(other / UNET)
    change(model / UNET)
    for source, revert, what in ((other, False, "base"), (model, True, "model")):
        with pytest.raises(UserError, match=f"is not the {what} of the patch .*{message}"):
            apply_patch(source, summary.patch, tmp_path / "out", revert=revert)
    assert not (tmp_path / "out").exists()


def test_a_damaged_patch_makes_nothing(base: Path, model: Path, tmp_path: Path) -> None:
    patch = make_patch(base, model, tmp_path / "patch.safetensors").patch
    whole = load_file(patch)
    metadata = {"format": "erasediff-patch-1", "index_bytes": "1000"}
    damaged = tmp_path / "damaged.safetensors"
    for name in whole:
        for change in (lambda t: t[:-1].clone(), lambda t: t.bitwise_xor(torch.tensor(255, dtype=torch.uint8))):
            save_file(whole | {name: change(whole[name])}, damaged, metadata=metadata)
            with pytest.raises(UserError, match="damaged"):
                apply_patch(base, damaged, tmp_path / "out")
    for content in (b"", b"nothing", patch.read_bytes()[:-1]):
        damaged.write_bytes(content)
        with pytest.raises(UserError, match="safetensors"):
            apply_patch(base, damaged, tmp_path / "out")
    with pytest.raises(UserError, match="is no patch"):
        apply_patch(base, base / UNET, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes_on_the_command_line(base: Path, model: Path, tmp_path: Path) -> None:
    patch = tmp_path / "patch.safetensors"
    assert run_command("patch", "make", base, model, "--out", tmp_path / "patch.bin") == 2
    assert run_command("patch", "make", base, model / UNET, "--out", patch) == 2
    assert run_command("patch", "make", base, tmp_path / "nothing", "--out", patch) == 2
    assert not patch.exists()
    succeed("patch", "make", base, model, "--out", patch, "--json")
    assert run_command("patch", "make", base, model, "--out", patch) == 2
    assert run_command("patch", "apply", base, patch, "--out", base) == 2
    assert run_command("patch", "apply", base / UNET, patch, "--out", tmp_path / "out") == 2
    assert run_command("patch", "revert", base, patch, "--out", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()
    succeed("patch", "apply", base, patch, "--out", tmp_path / "out")
    succeed("patch", "revert", tmp_path / "out", patch, "--out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


@given(st.sampled_from(sorted(DTYPES)), st.sampled_from(sorted(DTYPES)), st.integers(0, 5), st.integers(0, 99))
def test_a_delta_works_in_both_directions_or_is_none(one: str, other: str, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def drawn(code: str) -> Tensor:
        size = DTYPES[code].itemsize * count
        high = 2 if code == "BOOL" else 256
        return torch.randint(high, (size,), generator=generator, dtype=torch.uint8).view(DTYPES[code])

    before, after = drawn(one), drawn(other)
    change = delta(before, after)
    if change is None:
        assert one != other or not before.is_floating_point()
        return
    for source, made_of_it in ((before, after), (after, before)):
        found = apply_delta(source, change, made_of_it.dtype, tuple(made_of_it.shape))
        assert tensor_bytes(found) == tensor_bytes(made_of_it)


def test_the_index_of_a_patch_is_checked(base: Path, model: Path, tmp_path: Path) -> None:
    patch = make_patch(base, model, tmp_path / "patch.safetensors").patch
    pieces = load_file(patch)
    with safe_open(patch, framework="pt") as file:
        size = int(file.metadata()["index_bytes"])
    index: dict[str, Any] = json.loads(decompress(tensor_bytes(pieces["index"]), size))
    file_entry = index["before"].pop("model_index.json")
    for changed in (
        index | {"before": {"../out": file_entry}},
        index | {"before": {"/etc/passwd": file_entry}},
        index | {"after": {"a": {**file_entry, "bytes": -1}}},
        index | {"is_file": True},
        index | {"tensors": {"a": {"before": None, "after": None, "stored": "same"}}},
        index | {"more": 1},
    ):
        content = json.dumps(changed).encode()
        compressed = torch.frombuffer(bytearray(compress(content)), dtype=torch.uint8)
        metadata = {"format": "erasediff-patch-1", "index_bytes": str(len(content))}
        save_file(pieces | {"index": compressed}, tmp_path / "changed.safetensors", metadata=metadata)
        with pytest.raises(UserError, match="damaged"):
            apply_patch(base, tmp_path / "changed.safetensors", tmp_path / "made")
    assert not (tmp_path / "made").exists()

"""Checkpoints that were made to do harm: every file is refused by name, in one sentence, and none is waited for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

from erasediff.errors import UserError
from erasediff.io.tensor_file import TensorFile
from erasediff.models.checkpoint.diffusers_folder import DiffusersFolder
from erasediff.models.checkpoint.network_folder import NetworkFolder
from erasediff.models.checkpoint.opening import open_checkpoint
from erasediff.models.load import load_text_to_image

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(60)]
UNET = "unet/diffusion_pytorch_model.safetensors"
PAIR = ["transformers", "CLIPTokenizer"]


@pytest.fixture
def folder(nano_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(nano_folder("sd"), tmp_path / "sd"))


def refused(read: Callable[[Any], Any], source: object, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        read(source)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize(
    "name",
    ["a" * 256, "\u00e9" * 128, "a\0b", "a\nb", "c:evil", "CON", "nul.json", "Lpt1", "", "../up", "/etc"],
)
def test_names_that_no_folder_beside_the_index_has(folder: Path, name: str) -> None:
    change(folder / "model_index.json", **{name: PAIR})
    refused(DiffusersFolder, folder, r"model_index\.json names .*, which is no file or folder beside it")


@pytest.mark.parametrize("entry", [["x"], ["x", "y", "z"], [None, "x"], [1, 2], [["x"], "y"], [], [True, "x"]])
def test_entries_that_are_no_pair(folder: Path, entry: Any) -> None:
    change(folder / "model_index.json", vae=entry)
    refused(DiffusersFolder, folder, r"model_index\.json is damaged: its vae is no pair of a library and a class")


@pytest.mark.parametrize("name", [["x", "y"], None, 3, {}])
def test_a_pipeline_that_is_no_name(folder: Path, name: Any) -> None:
    change(folder / "model_index.json", _class_name=name)
    refused(DiffusersFolder, folder, "its _class_name is not the name of a pipeline")


@pytest.mark.parametrize(
    "text", ["[]", "null", "", "{", "NaN", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 10**5, "\xff", '{"a": 1e999}']
)
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_json_that_is_damaged(folder: Path, file: str, text: str) -> None:
    (folder / file).write_bytes(text.encode("latin-1"))
    refused(load_text_to_image, folder, rf"{file} cannot be read")


@pytest.mark.parametrize(
    ("component", "cls"),
    [
        ("unet", "logging"),
        ("unet", "DiffusionPipeline"),
        ("text_encoder", "CLIPTokenizer"),
        ("scheduler", "logging"),
    ],
)
def test_a_class_of_another_kind(folder: Path, component: str, cls: str) -> None:
    library = "diffusers" if component in ("unet", "scheduler") else "transformers"
    change(folder / "model_index.json", **{component: [library, cls]})
    refused(load_text_to_image, folder, f"The {component} of .* is a .*{cls}|scheduler has no safetensors file")


@pytest.mark.parametrize("cls", ["CLIPTextModel", "pipeline", "AutoTokenizer", "logging"])
def test_a_tokenizer_of_another_kind(folder: Path, cls: str) -> None:
    change(folder / "model_index.json", tokenizer=["transformers", cls])
    refused(DiffusersFolder(folder).tokenizer, "tokenizer", f"is a {cls}, which is no tokenizer")


@pytest.mark.parametrize(
    ("file", "entries"),
    [
        ("unet/config.json", {"layers_per_block": 10**9}),
        ("unet/config.json", {"transformer_layers_per_block": [1, 10**9]}),
        ("unet/config.json", {"norm_num_groups": 0}),
        ("unet/config.json", {"block_out_channels": [10**30, 10**30]}),
        ("unet/config.json", {"down_block_types": [[]]}),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}),
        ("text_encoder/config.json", {"max_position_embeddings": 10**12}),
        ("text_encoder/config.json", {"hidden_size": "x"}),
        ("vae/config.json", {"scaling_factor": [None]}),
        ("vae/config.json", {"scaling_factor": 0}),
        ("vae/config.json", {"latents_mean": ["x"]}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": -1}),
        ("scheduler/scheduler_config.json", {"beta_end": 1e30}),
        ("scheduler/scheduler_config.json", {"beta_schedule": []}),
        ("scheduler/scheduler_config.json", {"trained_betas": -1}),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "x"}),
    ],
)
def test_settings_that_no_model_has(folder: Path, file: str, entries: dict[str, Any]) -> None:
    change(folder / file, **entries)
    refused(load_text_to_image, folder, f"{file.partition('/')[0]}.*(damaged|cannot be used)")


def test_infinity_as_diffusers_writes_it(folder: Path, tmp_path: Path) -> None:
    change(folder / "scheduler/scheduler_config.json", lambda_min_clipped=float("-inf"))
    load_text_to_image(folder).save(tmp_path / "out")
    assert "-Infinity" in (tmp_path / "out/scheduler/scheduler_config.json").read_text()


@pytest.mark.parametrize(
    "file", ["model_index.json", UNET, "vae/config.json", "tokenizer/merges.txt", "tokenizer/x", "README.md"]
)
def test_pipes(folder: Path, file: str) -> None:
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    expected = "has no model_index.json" if file == "model_index.json" else f"{file} is a named pipe, not a file"
    refused(load_text_to_image, folder, expected)


def test_pipes_in_the_place_of_a_model(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(open_checkpoint, tmp_path / "pipe.safetensors", r"pipe\.safetensors is a named pipe, not a file")
    os.mkfifo(tmp_path / "pipe")
    refused(open_checkpoint, tmp_path / "pipe", "neither a diffusers folder nor")


def test_a_link_to_itself(folder: Path) -> None:
    (folder / "unet" / "loop").symlink_to("loop")
    (folder / "vae" / "config.json").unlink()
    (folder / "vae" / "config.json").symlink_to("config.json")
    refused(load_text_to_image, folder, r"(loop|config\.json)")


def test_a_link_that_appears_after_the_model_was_read(folder: Path, tmp_path: Path) -> None:
    model = load_text_to_image(folder)
    (tmp_path / "secret").write_text("secret")
    (folder / "tokenizer" / "notes.txt").symlink_to(tmp_path / "secret")
    refused(model.save, tmp_path / "out", r"notes\.txt is a link that leads out of the checkpoint")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["README.md", "config.json", "classes.json", "diffusion_pytorch_model.safetensors"])
def test_links_out_of_a_networks_folder(name: str, nano_folder: Callable[[str], Path], tmp_path: Path) -> None:
    pipeline, folder = nano_folder("ddpm_unconditional"), tmp_path / "network"
    shutil.copytree(pipeline / "unet", folder)
    (tmp_path / "elsewhere").write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "elsewhere")
    refused(NetworkFolder, folder, f"{name} is a link that leads out of the checkpoint")


class TestShards:
    @pytest.fixture
    def index(self, nano: Any, tmp_path: Path) -> Path:
        path: Path = nano.save("sd", tmp_path / "sharded", max_shard_size="50KB")
        return path / "unet" / "diffusion_pytorch_model.safetensors.index.json"

    @pytest.mark.parametrize("name", [5, None, ["x"], {}, "../x", "a" * 300])
    def test_a_name_that_is_none(self, index: Path, name: Any) -> None:
        weights = json.loads(index.read_text())["weight_map"]
        change(index, weight_map={**weights, "conv_in.bias": name})
        refused(load_text_to_image, index.parent.parent, "which is no file or folder beside it")

    def test_a_weight_that_is_in_no_shard(self, index: Path) -> None:
        weights = json.loads(index.read_text())["weight_map"]
        change(index, weight_map={**weights, "more": weights["conv_in.bias"]})
        refused(load_text_to_image, index.parent.parent, r"index\.json names more in .*, which does not hold it")

    def test_a_weight_that_is_in_two(self, index: Path) -> None:
        weights = json.loads(index.read_text())["weight_map"]
        other = index.with_name(next(name for name in weights.values() if name != weights["conv_in.bias"]))
        save_file({**load(other.read_bytes()), "conv_in.bias": torch.zeros(3)}, other)
        refused(load_text_to_image, index.parent.parent, "conv_in.bias is in both .* and ")


def write_header(path: Path, header: object, content: bytes = b"") -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "invalid offset"),
        ({name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "ab"}, "invalid offset"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, "cannot be read as safetensors"),
        ({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}}, "overflow"),
        ({"a": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]}}, "a has 9223372036854775808 rows"),
        ({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, "holds a as C64, which is not known here"),
        ({"a": {"dtype": "X1", "shape": [1], "data_offsets": [0, 8]}}, "cannot be read as safetensors"),
        ({"__metadata__": {"a": 1}}, "cannot be read as safetensors"),
        (b"[" * 10**5, "cannot be read as safetensors"),
        (b"{}", "cannot be read as safetensors"),
        (b"\xff\xff", "cannot be read as safetensors"),
    ],
)
def test_headers_that_do_not_describe_their_file(tmp_path: Path, header: object, said: str) -> None:
    path = tmp_path / "x.safetensors"
    write_header(path, header, b"" if said.endswith("rows") else bytes(8))
    refused(TensorFile.open, path, said)


@pytest.mark.parametrize("length", [0, 1, 2**63, 10**8 + 1])
def test_headers_of_no_such_length(tmp_path: Path, length: int) -> None:
    (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little"))
    refused(TensorFile.open, tmp_path / "x.safetensors", "cannot be read as safetensors")


def test_tensors_without_elements_are_read(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(0, 3), "b": torch.ones(2, dtype=torch.uint16)}, tmp_path / "x.safetensors")
    tensors = TensorFile.open(tmp_path / "x.safetensors").tensors
    assert tensors["a"].load().shape == (0, 3)
    assert tensors["b"].load().tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.int8])
def test_weights_of_whole_numbers(folder: Path, dtype: torch.dtype) -> None:
    tensors = load((folder / UNET).read_bytes())
    save_file({**tensors, "conv_in.bias": tensors["conv_in.bias"].to(torch.uint8).to(dtype)}, folder / UNET)
    refused(load_text_to_image, folder, r"is quantized \(conv_in\.bias is torch")


@pytest.mark.parametrize(
    "head", ["license: [openrail", "a: &a [*a, *a]", "license: 2024-13-45", "license: {}", "license: no", "? [a]\n: b"]
)
def test_cards_that_say_nothing_of_a_licence(folder: Path, head: str) -> None:
    (folder / "README.md").write_text(f"---\n{head}\n---\n")
    assert "modelspec.license" not in DiffusersFolder(folder).metadata

"""A checkpoint on the disk: its parts, their configurations, and their weights under diffusers' names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from erasediff.errors import UserError
from erasediff.io.file_faults import fault_of
from erasediff.io.json_file import read_object
from erasediff.io.tensor_file import StoredTensor, TensorFile
from erasediff.models.checkpoint.links import check_plain_name

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
WEIGHT_FILES = (".safetensors", ".gguf", *PICKLES)
HOW_TO_CONVERT = (
    "convert them where you trust them, with pipeline.save_pretrained(folder, safe_serialization=True) of diffusers or "
    "its script convert_original_stable_diffusion_to_diffusers.py --to_safetensors."
)


class Checkpoint(Protocol):
    """Checkpoint on the disk: the source of a model's weights, and of its unchanged parts when it is saved."""

    @property
    def path(self) -> Path: ...

    @property
    def index(self) -> Mapping[str, Any]:
        """Content of model_index.json: "_class_name", and for each component [library, class]."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """Metadata of the file that holds the denoiser's weights."""
        ...

    @property
    def original(self) -> Mapping[str, StoredTensor]:
        """Tensors of a single file under its own names; empty for a folder."""
        ...

    def header(self, component: str) -> Mapping[str, str]:
        """Metadata of the files that hold a component's weights; empty where the file says nothing of it alone."""
        ...

    def config(self, component: str) -> dict[str, Any]:
        """Configuration of a component or scheduler. UserError if it is missing or damaged."""
        ...

    def tensors(self, component: str) -> Mapping[str, StoredTensor]:
        """Weights of a component by their names in a diffusers folder. UserError if they are missing or damaged."""
        ...

    def tokenizer(self, component: str) -> Any:
        """Load a component as a transformers tokenizer. UserError if it is not available."""
        ...

    def copy_small_files(self, folder: Path) -> None:
        """Write everything of a diffusers folder but the weights into ``folder``."""
        ...

    def check_small_files(self) -> None:
        """UserError for what ``copy_small_files`` would not find or could not read."""
        ...


def has(checkpoint: Checkpoint, component: str) -> bool:
    """Return true if the checkpoint contains the component; an optional one may be left out, as [null, null]."""
    entry = checkpoint.index.get(component)
    return isinstance(entry, (list, tuple)) and len(entry) == 2 and all(isinstance(part, str) for part in entry)


def weighted_components(checkpoint: Checkpoint) -> list[str]:
    """Names of the components that have weights: all but tokenizers, schedulers and processors of images."""
    without = ("Tokenizer", "TokenizerFast", "Scheduler", "Processor", "Extractor", "ImageProcessorFast")
    return [
        name
        for name in checkpoint.index
        if not name.startswith("_") and has(checkpoint, name) and not checkpoint.index[name][1].endswith(without)
    ]


def write_small_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the configurations and tokenizers of a checkpoint that is no folder as diffusers saves them."""
    write_json(folder / "model_index.json", checkpoint.index)
    for name in checkpoint.index:
        if name.startswith("_") or not has(checkpoint, name):
            continue
        if name.startswith("tokenizer"):
            checkpoint.tokenizer(name).save_pretrained(folder / name)
        else:
            file = "scheduler_config.json" if name == "scheduler" else "config.json"
            write_json(folder / name / file, checkpoint.config(name))


def check_small_files(checkpoint: Checkpoint) -> None:
    """UserError for a configuration or tokenizer that ``write_small_files`` would miss."""
    for name in checkpoint.index:
        if name.startswith("_") or not has(checkpoint, name):
            continue
        if name.startswith("tokenizer"):
            checkpoint.tokenizer(name)
        else:
            checkpoint.config(name)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, and its folder if it does not exist."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, with infinities as diffusers writes them. UserError for a file that is missing or damaged."""
    try:
        return read_object(path, infinity=True)
    except FileNotFoundError:
        raise UserError(
            f"{path} cannot be read: {fault_of(path)}."
            if path.is_symlink()
            else f"The checkpoint is incomplete: it has no {path}."
        ) from None


def read_index(path: Path) -> dict[str, Any]:
    """Read a model_index.json. UserError where it is missing or damaged, or names a component by no class.

    Components are pairs [library, class], or [null, null] for one that is left out; other entries are settings.
    """
    index = read_json(path)
    for name, entry in index.items():
        check_plain_name(name, path)
        if name == "_class_name" and not isinstance(entry, str):
            raise UserError(f"{path} is damaged: its _class_name is not the name of a pipeline.")
        if name.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        if len(entry) != 2 or not all(isinstance(part, str) for part in entry):
            raise UserError(f"{path} is damaged: its {name} is no pair of a library and a class.")
    return index


def component_files(folder: Path) -> list[TensorFile]:
    """Weight files in a component's folder: one file or the shards of an index, without variant if there are both.

    UserError if there are none, if the index or a shard is missing, or if there are only pickles, which are never
    opened.
    """
    if not folder.is_dir():
        raise UserError(f"The checkpoint is incomplete: it has no folder {folder}.")
    candidates = [
        path
        for path in folder.iterdir()
        if (path.suffix == ".safetensors" and "-of-" not in path.name) or ".safetensors.index." in path.name
    ]
    if not candidates:
        raise UserError(_no_weights(folder))
    chosen = min(candidates, key=_plain_first)
    if chosen.suffix == ".safetensors":
        return [TensorFile.open(chosen)]
    return _shards(chosen)


def _shards(index: Path) -> list[TensorFile]:
    """The files that an index names. UserError for one that is missing, and for weights missing or there twice."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} cannot be read: it has no weight_map.")
    for name in weight_map.values():
        check_plain_name(name, index)
    shards = {path.name: TensorFile.open(path) for path in _named_shards(index, weight_map)}
    for weight, name in weight_map.items():
        if weight not in shards[name].tensors:
            raise UserError(f"{index} names {weight} in {name}, which does not hold it: the checkpoint is damaged.")
    holders: dict[str, str] = {}
    for name, shard in shards.items():
        for weight in shard.tensors:
            if (other := holders.setdefault(weight, name)) != name:
                raise UserError(f"{weight} is in both {other} and {name} of {index.parent}: the checkpoint is damaged.")
    return list(shards.values())


def _named_shards(index: Path, weight_map: Mapping[str, str]) -> list[Path]:
    shards = []
    for name in dict.fromkeys(weight_map.values()):
        path = index.with_name(name)
        if not path.exists():
            reason = fault_of(path) or "copy or download it"
            raise UserError(f"The checkpoint is incomplete: {index} names {name}, which is missing: {reason}.")
        shards.append(path)
    return sorted(shards)


def _no_weights(folder: Path) -> str:
    paths = sorted(folder.iterdir())
    downloads = folder.parent / ".cache" / "huggingface" / "download" / folder.name
    if shard := next((path for path in paths if path.suffix == ".safetensors"), None):
        index = re.sub(r"(?:\.(\w+))?-\d+-of-\d+\.safetensors$", _index_suffix, shard.name)
        return f"The checkpoint is incomplete: {folder} holds shards of weights without their index: add {index}."
    if partial := next((path for path in (*paths, *downloads.glob("*")) if path.suffix == ".incomplete"), None):
        return f"The checkpoint is incomplete: the download of {folder} did not end ({partial.name}): finish it."
    if any(path.suffix in PICKLES for path in paths):
        return f"{folder} holds its weights as pickles, which can run code when opened: {HOW_TO_CONVERT}"
    if quantized := next((path for path in paths if path.suffix == ".gguf"), None):
        return f"{quantized} is quantized (GGUF): give unquantized weights as .safetensors."
    return f"The checkpoint is incomplete: {folder} has no safetensors file."


def _index_suffix(shard: re.Match[str]) -> str:
    return f".safetensors.index{f'.{shard[1]}' if shard[1] else ''}.json"


def _plain_first(path: Path) -> tuple[bool, bool, str]:
    """``model.safetensors``, then ``model.fp16.safetensors`` or its index, then other variants such as ``non_ema``."""
    variant = set(path.name.split(".")[1:]) - {"safetensors", "index", "json"}
    return bool(variant), not variant <= {"fp16", "bf16"}, path.name


LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def canonical_name(name: str) -> str:
    """Weight name without CLIP's "text_model.", with the VAE's attention as named since diffusers 0.15."""
    name = name.removeprefix("text_model.")
    layer, _, weight = name.rpartition(".")
    block, _, last = layer.rpartition(".")
    return f"{block}.{LEGACY_ATTENTION[last]}.{weight}" if last in LEGACY_ATTENTION else name

"""Saving of whole checkpoints: trained components from memory, everything else from the source checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erasediff.errors import UserError
from erasediff.io.atomic import atomic_directory, atomic_file
from erasediff.io.tensor_file import StoredTensor, shards, write_tensor_file
from erasediff.models.checkpoint.base import Checkpoint, canonical_name, read_json, weighted_components, write_json
from erasediff.models.checkpoint.components import empty_module
from erasediff.models.checkpoint.original_layout import LAYOUTS, to_original
from erasediff.models.checkpoint.recorded_config import record

Weights = Mapping[str, StoredTensor]


def save_folder(
    checkpoint: Checkpoint,
    path: Path,
    *,
    trained: Mapping[str, Mapping[str, Tensor]],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None,
    trained_dtypes: Mapping[str, torch.dtype],
    max_shard_size: int,
    replace: bool,
    documents: Mapping[str, Mapping[str, Any]],
) -> None:
    """Save a diffusers folder, atomically.

    A tensor that still equals the stored one is written with the stored one's bits, whatever dtype it was trained in.

    Args:
        checkpoint: Source of everything that was not trained.
        path: Folder to write.
        trained: State dicts of the trained components, by component.
        metadata: Metadata of the trained components' files.
        dtype: Floating dtype to store; None for that of the source.
        trained_dtypes: Dtypes of single tensors of the trained components, by name, in the place of the source's.
        max_shard_size: Largest size of a weight file, in bytes.
        replace: Replace a folder that exists.
        documents: JSON files to write beside model_index.json, by name.

    Raises:
        UserError: ``path`` exists and ``replace`` is false, or the disk refuses.
        ValueError: A trained component has weights that the source lacks, such as a LoRA that was not merged.
    """
    components = _components(checkpoint, trained, dtype, trained_dtypes)
    with atomic_directory(path, replace=replace) as folder:
        checkpoint.copy_small_files(folder)
        for name, content in documents.items():
            write_json(folder / name, content)
        for name, tensors in components.items():
            library = checkpoint.index[name][0]
            stem = "diffusion_pytorch_model" if library == "diffusers" else "model"
            # transformers refuses a file that does not say which framework wrote it.
            file_metadata = (
                metadata if name in trained else {"format": "pt"} | _inherited(checkpoint.header(name), dtype)
            )
            _write_component(folder / name, stem, tensors, file_metadata, max_shard_size)
            if dtype is not None:
                _record_dtype(folder / name / "config.json", dtype)
        _note_changes(folder / "README.md", trained)


def save_single_file(
    checkpoint: Checkpoint,
    path: Path,
    *,
    layout: str,
    trained: Mapping[str, Mapping[str, Tensor]],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None,
    trained_dtypes: Mapping[str, torch.dtype],
    markers: Mapping[str, StoredTensor],
    replace: bool,
) -> None:
    """Save one file in the original layout, atomically, with all other tensors of a source in that layout.

    Args:
        checkpoint: Source of everything that was not trained.
        path: File to write.
        layout: Key of ``LAYOUTS``.
        trained: State dicts of the trained components, by component.
        metadata: Metadata of the file.
        dtype: Floating dtype to store; None for that of the source.
        trained_dtypes: Dtypes of single tensors of the trained components, by name, in the place of the source's.
        markers: Additional entries of the file.
        replace: Replace a file that exists.

    Raises:
        UserError: ``path`` exists and ``replace`` is false, or the disk refuses.
        ValueError: A trained component has weights that the source lacks, such as a LoRA that was not merged.
    """
    if path.exists() and not replace:
        raise UserError(f"{path} exists already: remove it or choose another name.")
    metadata = {**metadata, **record(checkpoint, layout)}
    tensors = {name: tensor.cast(dtype) for name, tensor in checkpoint.original.items()}
    for name, weights in _components(checkpoint, trained, dtype, trained_dtypes).items():
        if table := LAYOUTS[layout].get(name):
            tensors |= to_original(table, weights, empty_module(checkpoint, name).config)
    with atomic_file(path) as partial:
        write_tensor_file(partial, tensors | dict(markers), metadata)


def _components(
    checkpoint: Checkpoint,
    trained: Mapping[str, Mapping[str, Tensor]],
    dtype: torch.dtype | None,
    trained_dtypes: Mapping[str, torch.dtype],
) -> dict[str, Weights]:
    chosen = {} if dtype is not None else {canonical_name(name): wide for name, wide in trained_dtypes.items()}
    return {
        name: _current(checkpoint, name, trained.get(name), dtype, chosen) for name in weighted_components(checkpoint)
    }


def _current(
    checkpoint: Checkpoint,
    component: str,
    state: Mapping[str, Tensor] | None,
    dtype: torch.dtype | None,
    chosen: Mapping[str, torch.dtype],
) -> Weights:
    stored = checkpoint.tensors(component)
    if state is None:
        return {name: tensor.cast(dtype) for name, tensor in stored.items()}
    weights = {canonical_name(name): tensor for name, tensor in state.items()}
    if weights.keys() - {canonical_name(name) for name in stored}:
        raise ValueError(f"the {component} has other weights than it was loaded with: merge its LoRA before saving it")
    # A file may hold more than the module takes, such as buffers of older releases.
    return {
        name: tensor.updated(weights[key], dtype or chosen.get(key))
        if (key := canonical_name(name)) in weights
        else tensor.cast(dtype)
        for name, tensor in stored.items()
    }


def _write_component(folder: Path, stem: str, tensors: Weights, metadata: Mapping[str, str], max_bytes: int) -> None:
    folder.mkdir(exist_ok=True)
    groups = shards(tensors, max_bytes)
    if len(groups) == 1:
        write_tensor_file(folder / f"{stem}.safetensors", groups[0], metadata)
        return
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        name = f"{stem}-{number:05}-of-{len(groups):05}.safetensors"
        write_tensor_file(folder / name, group, metadata)
        weight_map.update(dict.fromkeys(group, name))
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _inherited(header: Mapping[str, str], dtype: torch.dtype | None) -> dict[str, str]:
    """An untouched component's header; without its hashes where it is written in another dtype."""
    return {name: value for name, value in header.items() if dtype is None or "hash" not in name}


def _note_changes(card: Path, trained: Mapping[str, object]) -> None:
    """Licences such as Apache's and OpenRAIL ask that a changed model says so: one line at the end of its card."""
    note = f"The weights of `{'`, `'.join(trained)}` were changed by unlearning with erasediff.".encode()
    if card.is_file() and note not in card.read_bytes():
        with card.open("ab") as file:
            file.write(b"\n\n" + note + b"\n")


def _record_dtype(path: Path, dtype: torch.dtype) -> None:
    """transformers loads in the dtype that the configuration names."""
    config = read_json(path)
    for name in {"dtype", "torch_dtype"} & config.keys():
        config[name] = str(dtype).removeprefix("torch.")
    write_json(path, config)


STABILITY_AI = "https://github.com/Stability-AI/generative-models"
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}


def modelspec(
    source: Mapping[str, str], *, architecture: str, implementation: str, prediction_type: str, size: tuple[int, int]
) -> dict[str, str]:
    """ModelSpec metadata of an unlearned model: the source's without hashes and date, updated by the arguments."""
    updates = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": implementation,
        "modelspec.resolution": f"{size[1]}x{size[0]}",
    }
    if prediction_type in PREDICTIONS:
        updates["modelspec.prediction_type"] = PREDICTIONS[prediction_type]
    return {"modelspec.title": "Unlearned model", "format": "pt", **inherited_metadata(source), **updates}


def inherited_metadata(source: Mapping[str, str]) -> dict[str, str]:
    """Metadata of the source's denoiser that still holds of a changed one: all but hashes and date."""
    return {name: value for name, value in source.items() if "hash" not in name and name != "modelspec.date"}

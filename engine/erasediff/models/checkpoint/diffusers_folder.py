"""A checkpoint in diffusers' layout: one folder per component."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from erasediff.errors import UserError
from erasediff.io.tensor_file import StoredTensor, TensorFile
from erasediff.models.checkpoint.base import WEIGHT_FILES, component_files, has, read_json
from erasediff.models.checkpoint.hub import tokenizer_from_folder

WEIGHTS = (*(f"*{suffix}" for suffix in WEIGHT_FILES), "*.index*.json", "*.msgpack", "*.h5", "*.onnx*", "*.pb")
SMALL = shutil.ignore_patterns(*WEIGHTS)
INDEX = "model_index.json"


class DiffusersFolder:
    """Diffusers folder; implements ``Checkpoint``. UserError for another folder, and for missing parts of it."""

    original: Mapping[str, StoredTensor]

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / INDEX).is_file():
            raise UserError(_no_pipeline(path))
        self.index = read_json(path / INDEX)
        self.original = {}
        self._files: dict[str, list[TensorFile]] = {}

    @cached_property
    def metadata(self) -> dict[str, str]:
        return self._component("unet" if has(self, "unet") else "transformer")[0].metadata

    def config(self, component: str) -> dict[str, Any]:
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        return read_json(self.path / component / name)

    def tensors(self, component: str) -> dict[str, StoredTensor]:
        return {name: tensor for file in self._component(component) for name, tensor in file.tensors.items()}

    def _component(self, component: str) -> list[TensorFile]:
        if component not in self._files:
            self._files[component] = component_files(self.path / component)
        return self._files[component]

    def tokenizer(self, component: str) -> Any:
        return tokenizer_from_folder(self.index, self.path, component)

    def copy_small_files(self, folder: Path) -> None:
        shutil.copy2(self.path / INDEX, folder)
        for name in self.index:
            if not name.startswith("_") and has(self, name):
                shutil.copytree(self.path / name, folder / name, ignore=SMALL)

    def check_small_files(self) -> None:
        for name in self.index:
            if name.startswith("_") or not has(self, name):
                continue
            folder = self.path / name
            if not folder.is_dir():
                raise UserError(
                    f"The checkpoint is incomplete: {self.path / INDEX} names {name}, but there is no folder {folder}; "
                    f'restore it, or leave it out by writing "{name}": [null, null] there.'
                )
            _check_readable(folder)


def _check_readable(folder: Path) -> None:
    """UserError for a file in ``folder`` that is copied when a model is saved, and cannot be read."""
    for parent, _, files in os.walk(folder):
        for name in {*files} - SMALL(parent, files):
            path = Path(parent, name)
            if not path.exists():
                raise UserError(f"The checkpoint is incomplete: {path} is a link to a file that does not exist.")
            if not os.access(path, os.R_OK):
                raise UserError(f"{path} cannot be read: give yourself the right to read it.")


def _no_pipeline(path: Path) -> str:
    if not path.is_dir():
        return f"{path} does not exist, or is not a folder."
    if (path / "config.json").is_file():
        return f"{path} is one component of a model, not the model: give the folder above it, with model_index.json."
    return f"{path} is not a diffusers model folder: it has no model_index.json."

"""A checkpoint in diffusers' layout: one folder per component."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from erasediff.errors import UserError
from erasediff.io.tensor_file import StoredTensor, TensorFile
from erasediff.io.user_file import MEGABYTE, read_text
from erasediff.models.checkpoint.base import WEIGHT_FILES, component_files, has, read_index, read_json
from erasediff.models.checkpoint.hub import tokenizer_from_folder
from erasediff.models.checkpoint.links import check_links
from erasediff.models.checkpoint.quantized import unscaled

WEIGHTS = (*(f"*{suffix}" for suffix in WEIGHT_FILES), "*.index*.json", "*.msgpack", "*.h5", "*.onnx*", "*.pb")
SMALL = shutil.ignore_patterns(*WEIGHTS)
INDEX = "model_index.json"
CARD_HEAD = re.compile(r"\s*---\n(.*?)\n---(\n|$)", re.DOTALL)
"""YAML at the head of a model card."""
LARGEST_CARD = 10 * MEGABYTE
DOCUMENTS = re.compile(
    r"(licen[cs]e|notice|copying|readme|model.?card|authors|citation|attribution|terms|use.?policy).*|.*\.(md|txt)",
    re.IGNORECASE,
)
"""Names of the files beside model_index.json that say what may be done with the model, and are copied with it."""


class DiffusersFolder:
    """Diffusers folder; implements ``Checkpoint``. UserError for another folder, and for missing parts of it."""

    original: Mapping[str, StoredTensor]

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / INDEX).is_file():
            raise UserError(_no_pipeline(path))
        self.index = read_index(path / INDEX)
        self._check_links()
        self.original = {}
        self._files: dict[str, list[TensorFile]] = {}

    @cached_property
    def metadata(self) -> dict[str, str]:
        header = self._component("unet" if has(self, "unet") else "transformer")[0].metadata
        return {**_license(self.path / "README.md"), **header}

    def header(self, component: str) -> dict[str, str]:
        return {name: value for file in self._component(component) for name, value in file.metadata.items()}

    def config(self, component: str) -> dict[str, Any]:
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        return read_json(self.path / component / name)

    def tensors(self, component: str) -> dict[str, StoredTensor]:
        stored = {name: tensor for file in self._component(component) for name, tensor in file.tensors.items()}
        return unscaled(stored, self.path / component)

    def _component(self, component: str) -> list[TensorFile]:
        if component not in self._files:
            self._files[component] = component_files(self.path / component)
        return self._files[component]

    def tokenizer(self, component: str) -> Any:
        return tokenizer_from_folder(self.index, self.path, component)

    def copy_small_files(self, folder: Path) -> None:
        self._check_links()
        # The contents alone: a folder or file that is read-only must not make the copy so, which is written to.
        shutil.copyfile(self.path / INDEX, folder / INDEX)
        for name in documents_in(self.path):
            shutil.copyfile(self.path / name, folder / name)
        for name in self._components():
            for path in (self.path / name, *(self.path / name).rglob("*")):
                target = folder / path.relative_to(self.path)
                if path.is_dir():
                    target.mkdir(exist_ok=True)
                elif not _is_weights(path):
                    shutil.copyfile(path, target)

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

    def _check_links(self) -> None:
        check_links(self.path, [*files_in(self.path), *self._components()])

    def _components(self) -> list[str]:
        return [name for name in self.index if not name.startswith("_") and has(self, name)]


def files_in(folder: Path) -> list[str]:
    """Names of the files in ``folder`` itself that may be read: settings and documents."""
    return [path.name for path in folder.iterdir() if path.suffix == ".json" or DOCUMENTS.fullmatch(path.name)]


def documents_in(folder: Path) -> list[str]:
    """Names of the files in ``folder`` that say what may be done with the model there."""
    return [
        path.name
        for path in sorted(folder.iterdir())
        if path.is_file() and DOCUMENTS.fullmatch(path.name) and not _is_weights(path)
    ]


def _check_readable(folder: Path) -> None:
    """UserError for a file in ``folder`` that is copied when a model is saved, and cannot be read."""
    for parent, _, files in os.walk(folder):
        for name in {*files} - SMALL(parent, files):
            path = Path(parent, name)
            if not path.exists():
                raise UserError(f"The checkpoint is incomplete: {path} is a link to a file that does not exist.")
            if not os.access(path, os.R_OK):
                raise UserError(f"{path} cannot be read: give yourself the right to read it.")


def _license(card: Path) -> dict[str, str]:
    """The licence that a model card begins with, as ModelSpec records it: a single file has no card beside it."""
    if not card.is_file():
        return {}
    try:
        head = CARD_HEAD.match(read_text(card, LARGEST_CARD))
        # Nodes alone: values are made by constructors that fail in many ways, and of aliases without end.
        node = yaml.compose(head[1], Loader=yaml.SafeLoader) if head else None
    except (ValueError, yaml.YAMLError, RecursionError):
        # A card that is no YAML at its head says nothing of the licence.
        return {}
    pairs = node.value if isinstance(node, MappingNode) else ()
    said = {key.value: value.value for key, value in pairs if isinstance(key, ScalarNode) and _is_text(value)}
    name = said.get("license_name") or said.get("license")
    return {"modelspec.license": name} if name else {}


def _is_text(node: Node) -> bool:
    return isinstance(node, ScalarNode) and node.tag == "tag:yaml.org,2002:str"


def _is_weights(path: Path) -> bool:
    return any(path.match(pattern) for pattern in WEIGHTS)


def _no_pipeline(path: Path) -> str:
    if not path.is_dir():
        return f"{path} does not exist, or is not a folder."
    if (path / "config.json").is_file():
        return f"{path} is one component of a model, not the model: give the folder above it, with model_index.json."
    return f"{path} is not a diffusers model folder: it has no model_index.json."

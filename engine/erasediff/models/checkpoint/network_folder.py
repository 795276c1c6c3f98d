"""A denoiser's folder without folders of components, read as the checkpoint of a pipeline."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from erasediff.errors import UserError
from erasediff.io.tensor_file import StoredTensor, TensorFile
from erasediff.models.checkpoint.base import (
    WEIGHT_FILES,
    check_small_files,
    component_files,
    read_index,
    read_json,
    write_small_files,
)
from erasediff.models.checkpoint.diffusers_folder import INDEX, documents_in, files_in
from erasediff.models.checkpoint.links import check_links
from erasediff.models.checkpoint.quantized import unscaled

CONFIG = "config.json"
SCHEDULER = "scheduler_config.json"


class NetworkFolder:
    """Folder of a UNet2DModel itself; implements ``Checkpoint``.

    The first pipelines of diffusers have their model_index.json in it. Without one, it is read as a DDPMPipeline.

    Attributes:
        is_schedule_assumed: The folder has neither, nor a scheduler, which is then DDPM's own (Ho et al. 2020).
    """

    metadata: Mapping[str, str]
    original: Mapping[str, StoredTensor]

    def __init__(self, path: Path) -> None:
        self.path = path
        self._check_links()
        place = path / "scheduler" if (path / "scheduler").is_dir() else path
        has_index = (path / INDEX).exists()
        self.is_schedule_assumed = not has_index and not (place / SCHEDULER).exists()
        self._configs = {
            "unet": read_json(path / CONFIG),
            "scheduler": dict(DDPMScheduler().config) if self.is_schedule_assumed else read_json(place / SCHEDULER),
        }
        self.index = read_index(path / INDEX) if has_index else self._assumed_index()
        self.metadata, self.original = {}, {}

    def _assumed_index(self) -> dict[str, Any]:
        scheduler = self._configs["scheduler"].get("_class_name", DDPMScheduler.__name__)
        return {
            "_class_name": DDPMPipeline.__name__,
            "scheduler": ["diffusers", str(scheduler)],
            "unet": ["diffusers", UNet2DModel.__name__],
        }

    def header(self, component: str) -> dict[str, str]:
        return {name: value for file in self._files for name, value in file.metadata.items()}

    def config(self, component: str) -> dict[str, Any]:
        return self._configs[component]

    def tensors(self, component: str) -> dict[str, StoredTensor]:
        return unscaled({name: tensor for file in self._files for name, tensor in file.tensors.items()}, self.path)

    @cached_property
    def _files(self) -> list[TensorFile]:
        return component_files(self.path)

    def tokenizer(self, component: str) -> Any:
        raise UserError(f"{self.path} has no {component}.")

    def _check_links(self) -> None:
        weights = [path.name for path in self.path.iterdir() if path.suffix in WEIGHT_FILES]
        check_links(self.path, [*files_in(self.path), *weights, "scheduler"])

    def copy_small_files(self, folder: Path) -> None:
        self._check_links()
        write_small_files(self, folder)
        for name in documents_in(self.path):
            shutil.copyfile(self.path / name, folder / name)

    def check_small_files(self) -> None:
        check_small_files(self)


def is_network_alone(folder: Path) -> bool:
    """Return true for the folder of a UNet2DModel that is not a component in the folder of a pipeline."""
    if not (folder / CONFIG).is_file() or (folder / "unet").is_dir():
        return False
    if not (folder / INDEX).exists() and (folder.parent / INDEX).exists():
        return False
    try:
        return bool(read_json(folder / CONFIG).get("_class_name") == UNet2DModel.__name__)
    except UserError:
        return False

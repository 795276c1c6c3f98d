"""Checkpoint of a network that was just built, which is on no disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from erasediff.errors import UserError
from erasediff.io.tensor_file import StoredTensor
from erasediff.models.checkpoint.base import check_small_files, write_small_files


class InMemoryCheckpoint:
    """Networks and scheduler of diffusers as the checkpoint of a pipeline; implements ``Checkpoint``.

    Args:
        pipeline: Name of the pipeline's class.
        scheduler: Its scheduler.
        networks: Its networks by component. Their weights are not copied.
    """

    path = Path("the new model")
    metadata: Mapping[str, str] = {}
    original: Mapping[str, StoredTensor] = {}

    def __init__(self, pipeline: str, scheduler: Any, **networks: Any) -> None:
        self._networks = networks
        self._parts = {"scheduler": scheduler, **networks}
        self.index: dict[str, Any] = {
            "_class_name": pipeline,
            "_diffusers_version": diffusers.__version__,
            **{name: ["diffusers", type(part).__name__] for name, part in self._parts.items()},
        }

    def header(self, component: str) -> Mapping[str, str]:
        return {}

    def config(self, component: str) -> dict[str, Any]:
        config: dict[str, Any] = json.loads(self._parts[component].to_json_string())
        return config

    def tensors(self, component: str) -> dict[str, StoredTensor]:
        state = self._networks[component].state_dict()
        return {name: StoredTensor(value.dtype, tuple(value.shape), value.clone) for name, value in state.items()}

    def tokenizer(self, component: str) -> Any:
        raise UserError(f"A model that was built here has no {component}.")

    def copy_small_files(self, folder: Path) -> None:
        write_small_files(self, folder)

    def check_small_files(self) -> None:
        check_small_files(self)

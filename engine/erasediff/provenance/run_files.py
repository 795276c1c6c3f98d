"""Files that a run's receipt covers: what it wrote, and the checkpoint and lists that it read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from erasediff.config import Config
from erasediff.io.json_file import read_object
from erasediff.io.temporary_names import is_temporary
from erasediff.models.checkpoint.base import WEIGHT_FILES, Checkpoint, component_files, has
from erasediff.models.checkpoint.diffusers_folder import DiffusersFolder, files_in
from erasediff.models.checkpoint.network_folder import NetworkFolder
from erasediff.models.checkpoint.opening import open_checkpoint
from erasediff.training.checkpoint import PREFIX
from erasediff.training.run_dir import MODEL, SINGLE_FILE

RECEIPT, SIGNATURE = "receipt.json", "receipt.json.sig"
AUDIT, VERDICT, VERDICT_LINES = "audit.jsonl", "verdict.json", "verdict.jsonl"
OWN = (RECEIPT, SIGNATURE, "crash.log")
"""Files of a run that its receipt never covers."""


def covered_files(run: Path) -> Iterator[tuple[str, Path]]:
    """Files of a run by their names within it: all but ``OWN``, the training checkpoints, and unfinished ones."""
    for name in sorted(_files_below(run)):
        first = name.split("/")[0]
        if name not in OWN and not first.startswith(PREFIX):
            yield name, run / name


def may_be_added(name: str, model: Path | None) -> bool:
    """Return true for a file that a run may hold beside what its receipt covers: neither weights nor of its model."""
    within = model is not None and name.startswith(f"{model.name}/")
    return not within and not name.endswith(WEIGHT_FILES)


def _files_below(folder: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_temporary(name)]
        yield from (
            Path(parent, name).relative_to(folder).as_posix()
            for name in files
            if not is_temporary(name) and Path(parent, name).is_file()
        )


def output_model(run: Path) -> Path | None:
    """The model of a run, a folder or a single file, by the name that its verdict may have given it.

    None for a run without, such as one that made an eraser. UserError for a verdict that is damaged.
    """
    verdict = read_object(run / VERDICT) if (run / VERDICT).is_file() else {}
    named = verdict.get("model")
    names = (MODEL, SINGLE_FILE) if not isinstance(named, str) or "/" in named else (named, MODEL, SINGLE_FILE)
    return next((run / name for name in names if name not in ("", ".", "..") and (run / name).exists()), None)


def open_source(config: Config, path: Path) -> Checkpoint:
    """Open the checkpoint at ``path`` as the run of ``config`` opened its own. UserError as ``open_checkpoint``."""
    settings = config.text_to_image
    return open_checkpoint(path, config=settings.config, prediction_type=settings.prediction_type)


def open_output(config: Config, path: Path, source: Checkpoint) -> Checkpoint:
    """Open the model at ``path`` that a run made of ``source``: a single file does not say all of its architecture."""
    settings = config.text_to_image
    folder = settings.config or (source.path if isinstance(source, DiffusersFolder) else None)
    return open_checkpoint(path, config=folder, prediction_type=settings.prediction_type)


def checkpoint_files(checkpoint: Checkpoint) -> Iterator[tuple[str, Path]]:
    """Files of a checkpoint that a run reads, by their names within it: of several variants of weights, one."""
    path = checkpoint.path
    if isinstance(checkpoint, DiffusersFolder):
        components = [name for name in checkpoint.index if not name.startswith("_") and has(checkpoint, name)]
        for name in sorted(files_in(path)):
            yield name, path / name
        for name in components:
            for file in sorted(_files_below(path / name)):
                if not _is_weights(file):
                    yield f"{name}/{file}", path / name / file
            yield from _weights(path / name, f"{name}/")
    elif isinstance(checkpoint, NetworkFolder):
        for settings in sorted(path.glob("*.json")):
            if not _is_weights(settings.name):
                yield settings.name, settings
        yield from _weights(path, "")
    else:
        yield path.name, path


def _is_weights(name: str) -> bool:
    return name.endswith(WEIGHT_FILES) or ".safetensors.index." in name


def _weights(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    # Tokenizers and schedulers have none, of which ``component_files`` would complain.
    if any(file.suffix == ".safetensors" for file in folder.iterdir()):
        for file in component_files(folder):
            yield f"{prefix}{file.path.name}", file.path
        for index in sorted(folder.glob("*.safetensors.index*.json")):
            yield f"{prefix}{index.name}", index

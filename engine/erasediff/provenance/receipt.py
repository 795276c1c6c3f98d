"""Receipts of runs: hashes of everything read and written, what moved, and the receipt of the run before."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from platform import python_version
from typing import Any, Literal

from erasediff.config import Config, load_config
from erasediff.io.atomic import atomic_write
from erasediff.parallel.control_plane import ControlPlane
from erasediff.provenance.canonical import DIGEST, canonical_json, content_sha256
from erasediff.provenance.digests import describe_files, file_sha256
from erasediff.provenance.moves import measure_moves
from erasediff.provenance.run_figures import run_figures
from erasediff.provenance.run_files import (
    AUDIT,
    RECEIPT,
    SIGNATURE,
    VERDICT,
    VERDICT_LINES,
    checkpoint_files,
    covered_files,
    open_output,
    open_source,
    output_model,
)
from erasediff.provenance.ssh_signature import SshKey
from erasediff.training.run_dir import CONFIG
from erasediff.utils.versions import library_versions

FORMAT = 1
Command = Literal["train", "unlearn"]


def record_run(run: Path, command: Command, key: SshKey | None = None) -> None:
    """Write the receipt of a run that has just ended: the main rank does, while the others wait for it."""
    peers = ControlPlane.current()
    with peers.main_process_first():
        if peers.is_main:
            write_receipt(run, command, key)


def write_receipt(run: Path, command: Command, key: SshKey | None = None) -> Path:
    """Write ``receipt.json`` to the folder of a finished run, signed with ``key`` in ``receipt.json.sig``.

    Only the run's folder and what its ``config.yaml`` names are read, so it may be written again, such as after an
    audit.

    Raises:
        UserError: A file of the run or its input cannot be read, or the disk refuses.
    """
    content = canonical_json(build_receipt(run, command))
    path, signature = run / RECEIPT, run / SIGNATURE
    # A signature of another content must not lie beside it, not even after a kill.
    signature.unlink(missing_ok=True)
    atomic_write(path, content)
    if key is not None:
        atomic_write(signature, key.sign(content))
    return path


def build_receipt(run: Path, command: Command) -> dict[str, Any]:
    """Content of the receipt of the finished run in ``run``. UserError as ``write_receipt``."""
    config = load_config(run / CONFIG)
    files = describe_files(covered_files(run))
    source = config.unlearn.model if command == "unlearn" else None
    checkpoint = None if source is None else open_source(config, source)
    model = output_model(run)
    receipt = {
        "format": FORMAT,
        "command": command,
        "versions": {**library_versions("transformers", "safetensors"), "python": python_version()},
        "seeds": {"seed": config.seed},
        "previous": None if checkpoint is None else previous_receipt(run, checkpoint.path),
        "input": {
            "model": None
            if checkpoint is None
            else {
                "name": _name(source, checkpoint.path),
                "path": relative_path(checkpoint.path, run),
                "files": describe_files(checkpoint_files(checkpoint)),
            },
            **_further_inputs(config, run),
        },
        "files": files,
        "moves": None
        if checkpoint is None or model is None
        else measure_moves(checkpoint, open_output(config, model, checkpoint)),
        "figures": run_figures(run),
        "evidence": {name: _sha256(files, name) for name in (VERDICT, VERDICT_LINES, AUDIT)},
    }
    return {**receipt, DIGEST: content_sha256(receipt)}


def relative_path(path: Path, run: Path) -> str:
    """``path`` as seen from the folder of a run, so that both can be moved together."""
    return Path(os.path.relpath(path.absolute(), os.path.realpath(run))).as_posix()


def previous_receipt(run: Path, model: Path) -> dict[str, str] | None:
    """The receipt of the run that made ``model``, which the run in ``run`` follows; None for a model of no run."""
    path = model.absolute().parent / RECEIPT
    return {"path": relative_path(path, run), "sha256": file_sha256(path)} if path.is_file() else None


def further_inputs(config: Config) -> Iterable[tuple[str, Path]]:
    """Files beside the model and the images that the run of ``config`` read."""
    for name, path in (("lora", config.text_to_image.lora), ("forget_files", config.images.forget_files)):
        if path is not None:
            yield name, path


def _further_inputs(config: Config, run: Path) -> dict[str, Any]:
    return {
        name: {"path": relative_path(path, run), "files": describe_files([(path.name, path)])}
        for name, path in further_inputs(config)
    }


def _name(source: Path | None, found: Path) -> str:
    """The model's name: that of the hub for one from there, else that of its folder or file."""
    return str(source) if source is not None and not source.exists() else found.name


def _sha256(files: dict[str, dict[str, Any]], name: str) -> str | None:
    return files[name]["sha256"] if name in files else None

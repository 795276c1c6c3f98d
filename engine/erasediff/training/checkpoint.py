"""One checkpoint: a folder with the state, and a manifest whose checksums tell damage from health."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from erasediff.errors import UserError
from erasediff.io.atomic import atomic_directory, publish, storage_errors, temporary_sibling
from erasediff.io.state_file import load_state, open_state, save_state
from erasediff.methods import Solver
from erasediff.parallel.control_plane import ControlPlane
from erasediff.parallel.unwrap import named
from erasediff.training.resharding import Fragments, from_full_checkpoint, opened, to_shards

PREFIX = "checkpoint-"
STATE = "state.safetensors"
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, order=True)
class Checkpoint:
    """The state of a run after ``step`` steps, at ``path``."""

    step: int
    path: Path

    @classmethod
    def at(cls, path: Path) -> Checkpoint:
        """The checkpoint that the folder ``path`` is named for. UserError if its name is not that of one."""
        number = path.name.removeprefix(PREFIX)
        if not path.name.startswith(PREFIX) or not number.isdecimal():
            raise UserError(f"{path} is not a checkpoint: checkpoints are folders called {PREFIX}<step>.")
        return cls(int(number), path)

    @classmethod
    def of_run(cls, folder: Path) -> list[Checkpoint]:
        """The checkpoints in a run's folder, oldest first."""
        paths = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
        return sorted(cls.at(path) for path in paths)

    @classmethod
    def newest(cls, folder: Path) -> Checkpoint | None:
        """The last checkpoint in a run's folder, if there is one."""
        return max(cls.of_run(folder), default=None)

    def save(self, state: Any) -> None:
        """Write ``state``; the folder appears whole or not at all, and replaces one of the same step."""
        with atomic_directory(self.path, replace=True) as folder:
            save_state(state, folder / STATE)
            self._write_manifest(folder, {STATE: _checksum(folder / STATE)})

    def save_shared(self, state: Any, peers: ControlPlane) -> None:
        """Write every rank's own ``state`` to its file; the folder appears once all of them are on the disk.

        UserError, the same on each rank, if one of them could not write. All ranks see one file system.
        """
        partial = Path(peers.broadcast_object(str(temporary_sibling(self.path))))
        try:
            written = peers.exchange(self._write_share(state, partial, peers))
            refusals = [share["error"] for share in written if "error" in share]
            if not refusals and peers.is_main:
                refusals = self._finish(partial, {share["name"]: share["sha256"] for share in written})
            refusals = peers.broadcast_object(refusals)
        finally:
            if peers.is_main:
                shutil.rmtree(partial, ignore_errors=True)
        if refusals:
            raise UserError(refusals[0])

    def load(self, device: torch.device | str = "cpu") -> Any:
        """The state of one process, tensors on ``device``. UserError if any of it is not as it was written."""
        if not self._is_healthy(self._checksums()):
            raise self._damaged()
        return load_state(self.path / STATE, device)

    @contextmanager
    def fragments(self, peers: ControlPlane) -> Iterator[Fragments]:
        """The state, of whatever layout, to be read within the block. Every rank calls it, and checks its share.

        UserError, the same on each rank, if any of it is not as it was written.
        """
        checksums = self._checksums()
        names = sorted(checksums)
        mine = {name: checksums[name] for name in names[peers.rank :: peers.size]}
        if not all(peers.exchange(self._is_healthy(mine))):
            raise self._damaged()
        if self.is_whole:
            yield from_full_checkpoint(self.path, self.path / STATE)
            return
        with opened(self.path, [self.path / name for name in names]) as fragments:
            yield fragments

    def random_state(self, peers: ControlPlane) -> Any | None:
        """What this rank's file says of its generators; None from a run of another number of ranks."""
        name = shared_state(peers)
        if name not in self._checksums():
            return None
        with open_state(self.path / name) as state:
            return {kind: stored.load() for kind, stored in state["random"].items()}

    @property
    def is_whole(self) -> bool:
        """Whether it is of one process, which has whole tensors."""
        return STATE in self._checksums()

    def _write_share(self, state: Any, partial: Path, peers: ControlPlane) -> dict[str, str]:
        name = shared_state(peers)
        try:
            with storage_errors(self.path):
                partial.mkdir(parents=True, exist_ok=True)
                save_state(state, partial / name)
                return {"name": name, "sha256": _checksum(partial / name)}
        except UserError as error:
            return {"error": str(error)}

    def _finish(self, partial: Path, checksums: dict[str, str]) -> list[str]:
        try:
            with storage_errors(self.path):
                self._write_manifest(partial, checksums)
                publish(partial, self.path)
        except UserError as error:
            return [str(error)]
        return []

    def _write_manifest(self, folder: Path, checksums: dict[str, str]) -> None:
        manifest = {"step": self.step, "sha256": checksums}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    def _checksums(self) -> dict[str, str]:
        try:
            manifest = json.loads((self.path / MANIFEST).read_text())
            checksums: dict[str, str] = dict(manifest["sha256"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise self._damaged() from None
        if manifest["step"] != self.step or not checksums:
            raise self._damaged()
        return checksums

    def _is_healthy(self, checksums: dict[str, str]) -> bool:
        try:
            return all(_checksum(self.path / name) == checksum for name, checksum in checksums.items())
        except OSError:
            return False

    def _damaged(self) -> UserError:
        return UserError(f"The checkpoint {self.path} is damaged{self._way_out()}.")

    def _way_out(self) -> str:
        older = [checkpoint for checkpoint in self.of_run(self.path.parent) if checkpoint.step < self.step]
        return f"; continue from the one before it with --resume {older[-1].path}" if older else ""


def shared_state(peers: ControlPlane) -> str:
    """The name of this rank's file in a checkpoint that ranks share."""
    return f"state-{peers.rank}-of-{peers.size}.safetensors"


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Snapshot(Protocol):
    """The state of a run; every rank has one."""

    def save(self, checkpoint: Checkpoint) -> None: ...

    def restore(self, checkpoint: Checkpoint) -> None: ...


class FullState:
    """Of one process. Reads checkpoints of any number of ranks."""

    def __init__(self, method: Solver, model: nn.Module) -> None:
        self.method = method
        self.model = model

    def save(self, checkpoint: Checkpoint) -> None:
        frozen = _frozen(self.model)
        weights = {name: tensor for name, tensor in self.model.state_dict().items() if name not in frozen}
        groups = self.method.optimizer.param_groups
        trained = [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]
        checkpoint.save(
            {
                "model": weights,
                # In the order of the optimizer's state.
                "parameters": list(named(self.model, trained)),
                "method": {"name": self.method.name, "state": self.method.state_dict()},
                "random": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
            }
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        if not checkpoint.is_whole:
            with checkpoint.fragments(ControlPlane.current()) as fragments:
                fragments.restore(self.method)
            return
        state = checkpoint.load(next(self.model.parameters()).device)
        missing, unexpected = self.model.load_state_dict(state["model"], strict=False)
        if unexpected or not _frozen(self.model).issuperset(missing):
            raise ValueError(f"the checkpoint is of another model: {[*unexpected, *missing][:3]}")
        self.method.load_state_dict(state["method"]["state"])
        torch.set_rng_state(state["random"]["cpu"].cpu())
        if len(state["random"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([generator.cpu() for generator in state["random"]["cuda"]])


class SharedSnapshot:
    """Of the ranks together: each writes and reads its part. Random states return where the ranks are as many again."""

    def __init__(self, method: Solver, peers: ControlPlane, *, replicated: bool, device: torch.device) -> None:
        self.method = method
        self.name = method.name
        self.peers = peers
        self.replicated = replicated
        self.device = device

    def save(self, checkpoint: Checkpoint) -> None:
        state = to_shards(self.method, with_shards=self.peers.is_main or not self.replicated)
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint.save_shared({**state, "method": self.name, "random": random}, self.peers)

    def restore(self, checkpoint: Checkpoint) -> None:
        with checkpoint.fragments(self.peers) as fragments:
            fragments.restore(self.method)
        random = checkpoint.random_state(self.peers)
        if random is not None:
            torch.set_rng_state(random["cpu"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(random["cuda"], self.device)


def snapshot_of(method: Solver, model: nn.Module, *, shared: bool) -> Snapshot:
    """``model`` is what the method trains, as it was before anything was put around it."""
    if not shared:
        return FullState(method, model)
    gradients = method.gradients
    return SharedSnapshot(method, ControlPlane.current(), replicated=gradients.replicated, device=gradients.device)


def _frozen(model: nn.Module) -> set[str]:
    """The weights that no step changes: they are where the model was loaded from."""
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}

"""Checkpoints of a run: folders with its state and a manifest of checksums, written by one process or by all ranks."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import torch
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError
from torch import Tensor, nn

from erasediff.errors import UserError, reason
from erasediff.io.atomic import atomic_directory, publish, storage_errors, temporary_sibling
from erasediff.io.json_file import read_object
from erasediff.io.state_file import HostState, load_state, open_state, save_state
from erasediff.io.user_file import check_regular
from erasediff.methods import Solver
from erasediff.parallel.control_plane import ControlPlane, PeerError
from erasediff.parallel.unwrap import named
from erasediff.training.resharding import Fragments, from_full_checkpoint, open_fragments, to_shards
from erasediff.utils.finite import first_not_finite

PREFIX = "checkpoint-"
STATE = "state.safetensors"
STATE_FILES = r"^state(-\d+-of-\d+)?\.safetensors$"
MANIFEST = "manifest.json"


class Manifest(BaseModel):
    """Content of ``MANIFEST``: the step, and the SHA-256 of each state file by its name."""

    step: NonNegativeInt
    sha256: Annotated[
        dict[Annotated[str, Field(pattern=STATE_FILES)], Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]],
        Field(min_length=1),
    ]


@dataclass(frozen=True, slots=True, order=True)
class Checkpoint:
    """Checkpoint of a run: its state after ``step`` steps, in the folder ``path``."""

    step: int
    path: Path

    @classmethod
    def at(cls, path: Path) -> Checkpoint:
        """Checkpoint in the folder ``path``.

        Raises:
            UserError: The folder does not have the name of a checkpoint.
        """
        number = path.name.removeprefix(PREFIX)
        if not path.name.startswith(PREFIX) or not number.isdecimal():
            raise UserError(f"{path} is not a checkpoint: checkpoints are folders called {PREFIX}<step>.")
        return cls(int(number), path)

    @classmethod
    def of_run(cls, folder: Path) -> list[Checkpoint]:
        """Checkpoints in a run's folder, oldest first."""
        paths = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
        return sorted(cls.at(path) for path in paths)

    @classmethod
    def newest(cls, folder: Path) -> Checkpoint | None:
        """Newest checkpoint in a run's folder, if there is one."""
        return max(cls.of_run(folder), default=None)

    def save(self, state: HostState) -> None:
        """Write the ``state`` of one process atomically, replacing an older checkpoint of the step.

        Raises:
            UserError: The disk refuses.
        """
        with atomic_directory(self.path, replace=True) as folder:
            self._write_manifest(folder, {STATE: state.save(folder / STATE)})

    def save_shared(self, state: Any, peers: ControlPlane) -> None:
        """Write every rank's own ``state`` to its file; the folder appears once all of them are on the disk.

        Every rank calls it at the same time. All ranks see one file system.

        Raises:
            UserError: The same on each rank, if one of them could not write.
        """
        partial = Path(peers.broadcast_object(str(temporary_sibling(self.path))))
        try:
            results = peers.exchange(self._write_shard(state, partial, peers))
            errors = [result["error"] for result in results if "error" in result]
            if not errors and peers.is_main:
                errors = self._finish(partial, {result["name"]: result["sha256"] for result in results})
            errors = peers.broadcast_object(errors)
        finally:
            if peers.is_main:
                shutil.rmtree(partial, ignore_errors=True)
        if errors:
            raise UserError(errors[0])

    def load(self, device: torch.device | str = "cpu") -> Any:
        """Read the state of one process, with tensors on ``device``.

        Raises:
            UserError: A checksum does not match.
        """
        if not self._matches(self._checksums()):
            raise self._damaged()
        if not self.is_whole:
            raise self._damaged()
        return load_state(self.path / STATE, device)

    @contextmanager
    def fragments(self, peers: ControlPlane) -> Iterator[Fragments]:
        """Open the state of any layout for reading within the block. A collective: ranks share the checksums.

        Raises:
            UserError: The same on each rank, if a checksum does not match.
        """
        checksums = self._checksums()
        names = sorted(checksums)
        assigned = {name: checksums[name] for name in names[peers.rank :: peers.size]}
        if not all(peers.exchange(self._matches(assigned))):
            raise self._damaged()
        if self.is_whole:
            yield from_full_checkpoint(self.path, self.path / STATE)
            return
        with open_fragments(self.path, [self.path / name for name in names]) as fragments:
            yield fragments

    def random_state(self, peers: ControlPlane) -> Any | None:
        """States of this rank's random generators; None from a run with another number of ranks."""
        name = shared_state(peers)
        if name not in self._checksums():
            return None
        with open_state(self.path / name) as state:
            return {kind: stored.load() for kind, stored in state["random"].items()}

    @property
    def is_whole(self) -> bool:
        """True if one process wrote the checkpoint, in whole tensors."""
        return STATE in self._checksums()

    def _write_shard(self, state: Any, partial: Path, peers: ControlPlane) -> dict[str, str]:
        name = shared_state(peers)
        try:
            with storage_errors(self.path):
                partial.mkdir(parents=True, exist_ok=True)
                return {"name": name, "sha256": save_state(state, partial / name)}
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
            manifest = Manifest.model_validate(read_object(self.path / MANIFEST), strict=True)
        except (OSError, UserError, ValidationError):
            raise self._damaged() from None
        if manifest.step != self.step:
            raise self._damaged()
        return manifest.sha256

    def _matches(self, checksums: dict[str, str]) -> bool:
        try:
            return all(_checksum(self.path / name) == checksum for name, checksum in checksums.items())
        except (OSError, UserError):
            return False

    def _damaged(self) -> UserError:
        return UserError(f"The checkpoint {self.path} is damaged{self._hint()}.")

    def _hint(self) -> str:
        older = [checkpoint for checkpoint in self.of_run(self.path.parent) if checkpoint.step < self.step]
        return f"; continue from the one before it with --resume {older[-1].path}" if older else ""


def shared_state(peers: ControlPlane) -> str:
    """File name of this rank's state in a sharded checkpoint."""
    return f"state-{peers.rank}-of-{peers.size}.safetensors"


def _checksum(path: Path) -> str:
    check_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Snapshot(Protocol):
    """Saves and restores the state of a run; every rank has one.

    Attributes:
        in_background: A captured state may be written by another thread while the run goes on.
    """

    in_background: ClassVar[bool]

    def capture(self) -> Callable[[Checkpoint], None]:
        """Copy the current state to the host; return a function that writes it as a checkpoint."""
        ...

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the current state. UserError if the disk refuses."""
        ...

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore the state from a checkpoint. UserError if it is damaged."""
        ...


class FullState:
    """State of a run in one process. Reads checkpoints of any number of ranks."""

    in_background: ClassVar[bool] = True

    def __init__(self, method: Solver, model: nn.Module) -> None:
        self.method = method
        self.model = model

    def capture(self) -> Callable[[Checkpoint], None]:
        frozen = _frozen(self.model)
        weights = {name: tensor for name, tensor in self.model.state_dict().items() if name not in frozen}
        groups = self.method.optimizer.param_groups
        trained = [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]
        state = HostState.copy_of(
            {
                "model": weights,
                # In the order of the optimizer's state.
                "parameters": list(named(self.model, trained)),
                "method": {"name": self.method.name, "state": self.method.state_dict()},
                "random": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
            }
        )
        return lambda checkpoint: checkpoint.save(state)

    def save(self, checkpoint: Checkpoint) -> None:
        self.capture()(checkpoint)

    def restore(self, checkpoint: Checkpoint) -> None:
        if not checkpoint.is_whole:
            with _fitting(checkpoint), checkpoint.fragments(ControlPlane.current()) as fragments:
                fragments.restore(self.method)
            return
        state = checkpoint.load(next(self.model.parameters()).device)
        with _fitting(checkpoint):
            missing, unexpected = self.model.load_state_dict(state["model"], strict=False)
            if unexpected or not _frozen(self.model).issuperset(missing):
                raise ValueError(f"it is of another model: {[*unexpected, *missing][:3]}")
            self.method.load_state_dict(state["method"]["state"])
            torch.set_rng_state(state["random"]["cpu"].cpu())
            if len(state["random"]["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all([generator.cpu() for generator in state["random"]["cuda"]])
        averages = _averages(self.method.optimizer, self.model)
        if (name := first_not_finite(chain(self.model.state_dict().items(), averages))) is not None:
            raise _diverged(checkpoint, name)


class ShardedState:
    """State of a run of several ranks, each of which writes and reads its part.

    Random states are restored where there are as many ranks again. The ranks agree on every write, in the order of
    their other agreements, so it is not done in the background.
    """

    in_background: ClassVar[bool] = False

    def __init__(self, method: Solver, peers: ControlPlane, *, replicated: bool, device: torch.device) -> None:
        self.method = method
        self.name = method.name
        self.peers = peers
        self.replicated = replicated
        self.device = device

    def capture(self) -> Callable[[Checkpoint], None]:
        shards = to_shards(self.method, with_shards=self.peers.is_main or not self.replicated)
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {**shards, "method": self.name, "random": random}
        return lambda checkpoint: checkpoint.save_shared(state, self.peers)

    def save(self, checkpoint: Checkpoint) -> None:
        self.capture()(checkpoint)

    def restore(self, checkpoint: Checkpoint) -> None:
        with _fitting(checkpoint), checkpoint.fragments(self.peers) as fragments:
            fragments.restore(self.method)
        shards = (
            (f"{shard.name} ({kind})", shard.tensors[kind])
            for shard in self.method.shards()
            for kind in ("weight", "ema")
            if kind in shard.tensors
        )
        names = [name for name in self.peers.exchange(first_not_finite(shards)) if name is not None]
        if names:
            raise _diverged(checkpoint, names[0])
        random = checkpoint.random_state(self.peers)
        if random is not None:
            torch.set_rng_state(random["cpu"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(random["cuda"], self.device)


def snapshot_of(method: Solver, model: nn.Module, *, shared: bool) -> Snapshot:
    """Make the snapshot of a run in one process or of several ranks.

    Args:
        method: Method to save and restore.
        model: The network that it trains, without a parallel wrapper.
        shared: Several ranks may take part; each of them calls every method.
    """
    if not shared:
        return FullState(method, model)
    gradients = method.gradients
    return ShardedState(method, ControlPlane.current(), replicated=gradients.replicated, device=gradients.device)


def _averages(optimizer: torch.optim.Optimizer, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if "ema" in (state := optimizer.state.get(parameter, {})):
            yield f"{name} (ema)", state["ema"]


@contextmanager
def _fitting(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn the errors of a state that is not of this run, though its checksums are right, into a UserError."""
    try:
        yield
    except (PeerError, torch.OutOfMemoryError):
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"The checkpoint {checkpoint.path} does not fit this run: {reason(error)}.") from error


def _diverged(checkpoint: Checkpoint, name: str) -> UserError:
    return UserError(f"The checkpoint {checkpoint.path} is of a run that diverged: {name} holds NaN or infinity.")


def _frozen(model: nn.Module) -> set[str]:
    """Names of the frozen weights: a checkpoint leaves them out, since the model is loaded before it."""
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}

"""Diffusion model of a checkpoint: base class of all families (components, lazy weights, update, saving)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from erasediff.diffusion.batch import Batch
from erasediff.diffusion.noise_schedule import Process
from erasediff.errors import UserError
from erasediff.io.tensor_file import LazyWeights, fingerprint
from erasediff.models.checkpoint.base import Checkpoint, canonical_name, has, weighted_components
from erasediff.models.checkpoint.changed import ChangedCheckpoint, Changes
from erasediff.models.checkpoint.components import (
    check_component,
    fill_component,
    load_component,
    load_scheduler,
    stored_weights,
)
from erasediff.models.checkpoint.recorded_config import prediction_markers
from erasediff.models.checkpoint.save import inherited_metadata, save_folder, save_single_file
from erasediff.models.diffusion_model import Condition
from erasediff.models.family import ModelFamily
from erasediff.models.weight_update import SavedDtype, WeightUpdate, measure_update

Layout = Literal["diffusers", "single-file"]


class CheckpointModel(ModelFamily):
    """Denoiser, scheduler and frozen components of a checkpoint.

    Attributes:
        checkpoint: What the components are read from.
        denoiser: The UNet or transformer, the only component that is trained.
        denoiser_weights: The denoiser's weights as the checkpoint has them, in ``dtype``, to be read one by one.
        encoder_names: The text encoders that the checkpoint has; none for a model without prompts.
        configs: Configuration of each network by component.
        scheduler: The checkpoint's own.
        process: Of ``scheduler``, prediction type included.
        dtype: Of denoiser and text encoders; the autoencoder is float32.
        device: Of all components.

    Args:
        checkpoint: What the components are read from.
        dtype: Of denoiser and text encoders.
        device: Of all components.
        empty: Leave the denoiser's parameters on the meta device, for a caller who shards and fills it.

    Raises:
        UserError: The checkpoint is incomplete, damaged, or its components do not fit each other; before any weight is
            read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        empty: bool = False,
    ) -> None:
        self.checkpoint: Checkpoint = checkpoint
        self.dtype = dtype
        self.device = torch.device(device)
        self.encoder_names = [
            name for name in self.text_encoders if name not in self.optional_encoders or has(checkpoint, name)
        ]
        modules = {name: check_component(checkpoint, name) for name in (self.denoiser_component, *self._frozen_names)}
        self.configs: dict[str, Any] = {name: module.config for name, module in modules.items()}
        for name in weighted_components(checkpoint):
            # Also those that only a save will read: it must not fail when the work is done.
            checkpoint.tensors(name)
        self.scheduler = load_scheduler(checkpoint, flow=self.flow)
        self.process = Process.from_scheduler(self.scheduler)
        self._check_components()
        self._encoders: dict[str, nn.Module] | None = None
        denoiser = self._set_up(modules[self.denoiser_component])
        self.denoiser_weights: LazyWeights = stored_weights(checkpoint, self.denoiser_component, denoiser, dtype)
        if empty:
            # diffusers' own ``to`` warns of modules kept in float32 even where there are none.
            self.denoiser = nn.Module.to(denoiser, dtype).eval()
        else:
            self.denoiser = fill_component(denoiser, self.denoiser_weights, self.device)

    def _check_components(self) -> None:
        """Raise UserError for components that do not fit each other, before any weight is read."""
        for part, size, other, expected in self._widths():
            if size != expected:
                raise UserError(
                    f"The parts of {self.checkpoint.path} do not fit together: {part} is {size}, but {other} is "
                    f"{expected}."
                )

    def _widths(self) -> Iterable[tuple[str, int, str, int]]:
        """(part, size, other part, size) that must agree between components for them to be one model."""
        return ()

    def _set_up(self, denoiser: nn.Module) -> nn.Module:
        """The empty denoiser with settings that its configuration has no place for."""
        return denoiser

    @property
    def _frozen_names(self) -> list[str]:
        """Components that ``encoders`` reads."""
        autoencoder = self.autoencoder_component
        return [*([] if autoencoder is None else [autoencoder]), *self.encoder_names]

    @property
    @abstractmethod
    def condition(self) -> Condition:
        """What the denoiser is told besides the timestep."""

    @abstractmethod
    def predict(self, model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor:
        """The network's prediction, a ``losses.Denoiser``.

        Args:
            model: The denoiser, or a copy or wrapper of it.
            noisy_sample: [B, C, h, w].
            timesteps: [B], of ``process.conditioning``.
            condition: The batch's other entries: class labels, or what ``encode_prompts`` and ``size_condition``
                return. Everything else that the network takes, such as positions and packing, is made inside.

        Returns:
            [B, C, h, w] in the dtype of ``model``.
        """

    def to(self, device: torch.device | str) -> Self:
        """Move the denoiser's weights, and whatever is read from now on; return this same model."""
        if torch.device(device) != self.device:
            self.device = torch.device(device)
            self.release_encoders()
        if not self.denoiser_is_meta:
            self.denoiser.to(device)
        return self

    def materialize_denoiser(self) -> nn.Module:
        """``denoiser``, or where that is empty, one with weights that lives as long as the caller holds it."""
        if not self.denoiser_is_meta:
            return self.denoiser
        return self._set_up(load_component(self.checkpoint, self.denoiser_component, self.dtype, self.device))

    @property
    def denoiser_is_meta(self) -> bool:
        """Whether the denoiser's weights are on the disk alone, and its parameters on the meta device."""
        return any(parameter.is_meta for parameter in self.denoiser.parameters())

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """Autoencoder, in float32 since SDXL's overflows in half precision, and text encoders; read when needed."""
        if self._encoders is None:
            self._encoders = {}
            for name in self._frozen_names:
                dtype = torch.float32 if name == self.autoencoder_component else self.dtype
                module = load_component(self.checkpoint, name, dtype, self.device)
                self._encoders[name] = module.requires_grad_(False)
        return self._encoders

    def release_encoders(self) -> None:
        """Text encoders and autoencoder leave memory until they are next needed; ``hash`` stays."""
        self._encoders = None

    def change_encoders(self, changes: Mapping[str, Changes]) -> None:
        """Read text encoders with ``changes`` to their weights from now on, and save them so; ``hash`` follows."""
        self.checkpoint = ChangedCheckpoint(self.checkpoint, changes)
        self.release_encoders()
        vars(self).pop("hash", None)

    def restore_encoders(self) -> None:
        """Load text encoders and autoencoder now; whatever needs them does so by itself."""
        _ = self.encoders

    @property
    @abstractmethod
    def hash(self) -> str:
        """Hash of all that the samples and conditions in a cache depend on."""

    def denoiser_hash(self) -> str:
        """SHA-256 over the denoiser's weights as they are now."""
        weights = self.denoiser_weights if self.denoiser_is_meta else {}
        named = sorted(self.denoiser.state_dict().items())
        return fingerprint(
            self.denoiser_component, ((name, weights[name]() if name in weights else tensor) for name, tensor in named)
        )

    def measure_update(self, dtype: SavedDtype = None) -> WeightUpdate:
        """Compare the denoiser with the checkpoint, and choose the dtypes to save it in: see ``weight_update``."""
        stored = {canonical_name(n): t.dtype for n, t in self.checkpoint.tensors(self.denoiser_component).items()}
        dtypes = {name: stored[canonical_name(name)] for name in self.denoiser_weights}
        return measure_update(self.denoiser_weights, self.denoiser.state_dict(), dtypes, dtype)

    def save(
        self,
        path: Path,
        *,
        layout: Layout = "diffusers",
        dtype: SavedDtype = None,
        max_shard_size: int = 10_000_000_000,
        replace: bool = False,
        update: WeightUpdate | None = None,
    ) -> None:
        """Write the whole checkpoint, atomically: a diffusers folder, or one file in the original layout (sd, sdxl).

        Args:
            path: The folder or file.
            layout: "diffusers" or "single-file".
            dtype: None or "stored": every tensor that did not change has the input's bits, and those that did have its
                dtype, or for None a wider one where that would lose more than 1% of the change.
            max_shard_size: In bytes, for the folder.
            replace: Take the place of a ``path`` that exists.
            update: What ``measure_update`` returned for ``dtype``; None measures now.

        Raises:
            RunFailedError: A weight is not finite, or becomes so in ``dtype``.
            UserError: The family lacks the layout, ``path`` exists and is not to be replaced, or the disk refuses.
        """
        if path.resolve() == self.checkpoint.path.resolve():
            raise UserError(f"{path} is where the model came from, and is still read from: save it under another name.")
        update = update or self.measure_update(dtype)
        common: dict[str, Any] = {
            "trained": {self.denoiser_component: self.denoiser.state_dict()},
            "metadata": self._metadata(layout),
            "dtype": dtype if isinstance(dtype, torch.dtype) else None,
            "trained_dtypes": update.dtypes,
            "replace": replace,
        }
        if layout == "diffusers":
            documents = self._documents()
            save_folder(self.checkpoint, path, max_shard_size=max_shard_size, documents=documents, **common)
            return
        if self.original_layout is None:
            raise UserError(f"A {self.family} model has no single-file layout here: save it as a diffusers folder.")
        save_single_file(
            self.checkpoint,
            path,
            layout=self.original_layout,
            markers=prediction_markers(self.scheduler.config),
            **common,
        )

    def _metadata(self, layout: Layout) -> dict[str, str]:
        """Metadata of the file that holds the denoiser's weights."""
        return {"format": "pt", **inherited_metadata(self.checkpoint.metadata)}

    def _documents(self) -> Mapping[str, Mapping[str, Any]]:
        """JSON files that belong beside model_index.json, by name."""
        return {}

    @property
    def original_layout(self) -> str | None:
        """The layout of the family's single files, of ``original_layout.LAYOUTS``; None for a family without."""
        return None


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that a network computes in: that of its first weight."""
    return next(model.parameters()).dtype

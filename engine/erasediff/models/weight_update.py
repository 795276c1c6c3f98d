"""Difference of trained weights from the original ones, and the dtype that keeps it when they are saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, sqrt
from typing import Literal

import torch
from torch import Tensor, nn

from erasediff.errors import RunFailedError
from erasediff.io.tensor_file import LazyWeights
from erasediff.utils.finite import all_finite

LARGEST_LOSS = 0.01
"""Share of an update's squared norm that saving may lose before a wider dtype is taken."""
CHUNK = 2**18
"""Elements compared at once: their copies stay in a core's cache."""

SavedDtype = torch.dtype | Literal["stored"] | None
"""A dtype for every tensor; "stored", that of each tensor in the source; or None, the narrowest that keeps the update:
see ``measure_update``."""

Rounding = Callable[[torch.dtype], torch.dtype]
"""The dtype in which a tensor of the given stored dtype is saved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """Difference u = w - w_0 of the weights w in memory from w_0, those before the first step.

    Attributes:
        weights: Number of elements of the network.
        changed: Number of those where u is not 0.
        relative: |u| / |w_0| over the tensors in which an element changed; 0 for none.
        saved: Number of elements that still differ from w_0 as they are saved.
        lost: Share of the update that saving loses, |w - s|^2 / |u|^2 for s, the weights as they are saved.
        dtypes: Dtype to save each tensor in that changed, by its name.
        note: Sentence for the user on what saving loses, or on a wider dtype than the stored one; None for neither.
    """

    weights: int
    changed: int
    relative: float
    saved: int
    lost: float = 0.0
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    note: str | None = None

    def check(self) -> WeightUpdate:
        """Return self.

        Raises:
            RunFailedError: No weight changed, or none as saved.
        """
        if self.changed == 0:
            raise RunFailedError(
                "No weight of the model changed, so it was not saved: raise the learning rate or the number of steps, "
                "or give another target or anchor."
            )
        if self.saved == 0:
            raise RunFailedError(
                f"None of the {self.changed:,} weights that changed still differs in the dtype to save in, so the "
                "model was not saved: omit output.dtype, or set it to float32."
            )
        return self


@torch.no_grad()
def measure_update(
    original: LazyWeights,
    current: Mapping[str, Tensor],
    stored: Mapping[str, torch.dtype] | None = None,
    dtype: SavedDtype = None,
) -> WeightUpdate:
    """Compare weights with the original ones, one tensor in memory at a time, and choose the dtypes to save them in.

    For None, these are the stored dtypes if they lose at most ``LARGEST_LOSS`` of the update (``WeightUpdate.lost``,
    over all tensors together), or else at least bfloat16, or else at least float32. A tensor that did not change keeps
    its dtype.

    Args:
        original: Weights before the first step, by name.
        current: State dict of the trained network; entries that ``original`` lacks do not count.
        stored: Dtypes in the source; None for those of ``current``.
        dtype: See ``SavedDtype``.

    Raises:
        RunFailedError: A weight is not finite, or becomes so in the dtype that it is to be saved in.
    """
    roundings = _roundings(dtype)
    sums = [_Sums() for _ in roundings]
    weights = changed = 0
    update = before = 0.0
    sources: dict[str, torch.dtype] = {}
    for name, load in original.items():
        if name not in current or not current[name].is_floating_point():
            continue
        value = current[name].detach().cpu()
        first = load().to("cpu", value.dtype)
        weights += value.numel()
        if torch.equal(first, value):
            continue
        if not all_finite(value):
            raise RunFailedError(
                f"The trained weights are not finite ({name}), so the model was not saved: lower the learning rate."
            )
        sources[name] = value.dtype if stored is None else stored[name]
        targets = [rounding(sources[name]) for rounding in roundings]
        for new, old in zip(_chunks(value), _chunks(first), strict=True):
            changed += int((new != old).count_nonzero())
            update += _squared_norm(new.float() - old.float())
            before += _squared_norm(old.float())
            parts = {target: _lost_and_changed(new.to(target), new, old) for target in set(targets)}
            for target, total in zip(targets, sums, strict=True):
                total.add(*parts[target])
    losses = [total.lost / update if update else 0.0 for total in sums]
    chosen = len(losses) - 1
    if dtype is None:
        chosen = next((number for number, loss in enumerate(losses) if loss <= LARGEST_LOSS), chosen)
    if not isfinite(losses[chosen]):
        raise RunFailedError(
            "The trained weights are too large for the dtype to save in, so the model was not saved: set output.dtype "
            "to float32, or lower the learning rate."
        )
    dtypes = {name: roundings[chosen](source) for name, source in sources.items()}
    return WeightUpdate(
        weights=weights,
        changed=changed,
        relative=sqrt(update / before) if before else 0.0,
        saved=sums[chosen].changed,
        lost=losses[chosen],
        dtypes=dtypes,
        note=_note(losses, chosen, dtypes),
    )


def _note(losses: Sequence[float], chosen: int, dtypes: Mapping[str, torch.dtype]) -> str | None:
    if losses[chosen] > LARGEST_LOSS:
        return f"The dtype to save in loses {losses[chosen]:.0%} of the update; output.dtype=float32 keeps it."
    if chosen == 0:
        return None
    wider = " and ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()}))
    return (
        f"The stored dtype would lose {losses[0]:.0%} of the update, so what was trained is saved in {wider}; "
        "output.dtype=stored keeps the stored dtype."
    )


def host_copy(network: nn.Module, only: Iterable[Tensor] | None = None) -> LazyWeights:
    """Weights of ``network`` now, copied to the host, under their names in a model without masks or adapters.

    Args:
        network: Network about to be trained.
        only: Parameters to copy; None for all entries of its state dict.
    """
    chosen = None if only is None else {id(parameter) for parameter in only}
    return {
        _plain(name): tensor.detach().to("cpu", copy=True).clone
        for name, tensor in network.state_dict(keep_vars=True).items()
        if chosen is None or id(tensor) in chosen
    }


def _plain(name: str) -> str:
    return name.replace(".parametrizations.weight.original", ".weight").replace(".base_layer.", ".")


def _roundings(dtype: SavedDtype) -> Sequence[Rounding]:
    """Possible choices, from narrow to wide."""
    if isinstance(dtype, torch.dtype):
        return [lambda _: dtype]
    return [_as_stored] if dtype == "stored" else [_as_stored, _at_least(torch.bfloat16), _at_least(torch.float32)]


def _as_stored(stored: torch.dtype) -> torch.dtype:
    return stored


def _at_least(least: torch.dtype) -> Rounding:
    return lambda stored: stored if stored.itemsize >= least.itemsize else least


@dataclass(slots=True)
class _Sums:
    """Sums over elements as they are saved: |s - w|^2, and how many differ from w_0."""

    lost: float = 0.0
    changed: int = 0

    def add(self, lost: float, changed: int) -> None:
        self.lost += lost
        self.changed += changed


def _lost_and_changed(saved: Tensor, new: Tensor, old: Tensor) -> tuple[float, int]:
    read = saved.to(new.dtype)
    return _squared_norm(read.float() - new.float()), int((read != old).count_nonzero())


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.reshape(-1)
    return (flat[begin : begin + CHUNK] for begin in range(0, flat.numel(), CHUNK))


def _squared_norm(values: Tensor) -> float:
    return float(values.dot(values))

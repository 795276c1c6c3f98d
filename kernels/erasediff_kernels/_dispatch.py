"""Which implementation of an operator runs.

A backend is a module with one function per operator (same name, same arguments as the schema in `_library`) and a set
`DEVICES` of the device types it can serve in this installation. For each device type the first backend of `PREFERENCE`
that serves it wins, unless `use_backend(...)` or the environment variable `ERASEDIFF_BACKEND` forces one; a forced
backend that cannot serve the device raises instead of falling back.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

MODULES = {
    "compiled": "erasediff_kernels._compiled",
    "triton": "erasediff_kernels._triton",
    "reference": "erasediff_kernels.reference",
}
PREFERENCE = {
    "cuda": ("compiled", "triton", "reference"),
    "cpu": ("compiled", "reference"),
}
ENVIRONMENT_VARIABLE = "ERASEDIFF_BACKEND"

_forced: str | None = os.environ.get(ENVIRONMENT_VARIABLE) or None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator of the block with backend `name`: "compiled", "triton" or "reference".

    Raises:
        ValueError: for another name.
        RuntimeError: from the operator, where the backend cannot serve the device of its tensors.
    """
    global _forced
    if name not in MODULES:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(MODULES)}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


@functools.cache
def load(backend: str) -> ModuleType | None:
    """The backend's module; None where the installation comes without it. A broken module raises its own error."""
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return None
    if importlib.util.find_spec(MODULES[backend]) is None:
        return None
    return importlib.import_module(MODULES[backend])


def devices(backend: str) -> frozenset[str]:
    """Device types that `backend` serves in this installation."""
    module = load(backend)
    return frozenset() if module is None else frozenset(module.DEVICES)


def available(device_type: str) -> tuple[str, ...]:
    """Backends that serve `device_type`: the preferred one first, then those that run only when forced."""
    preferred = PREFERENCE.get(device_type, ())
    order = (*preferred, *(backend for backend in MODULES if backend not in preferred))
    return tuple(backend for backend in order if device_type in devices(backend))


def forced() -> str | None:
    """The backend that `use_backend` or the environment asks for."""
    return _forced


def selected(device_type: str) -> str:
    """The backend that an operator on `device_type` would use now."""
    return _select(device_type, _forced)


def implementation(op: str, device_type: str) -> Callable[..., Any]:
    """The function that runs `op` on `device_type` now."""
    return _implementation(op, device_type, _forced)


def kernel(op: str) -> Callable[..., Any]:
    """The dispatcher entry of `op`: looks at the device of the first tensor and calls the implementation."""

    def run(*args: Any) -> Any:
        return _implementation(op, device_of(args).type, _forced)(*args)

    run.__name__ = op
    return run


PLAIN = frozenset({Tensor, torch.nn.Parameter})
LISTS = frozenset({list, tuple})


def accepting(op: str, *lists: Sequence[Tensor]) -> Callable[..., Any] | None:
    """A function that does what `op` does with lists which it looks at itself, and says so where it accepts none.

    It spares thousands of tensors Python's checks and one of two passes through the dispatcher: microseconds per tensor
    that a GPU would wait for. None where something else has to see the call (tracing, modes, subclasses of tensors) or
    another backend is to run.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or not lists[0]:
        return None
    function = _accepting(op, lists[0][0].device.type, _forced)
    if function is None or not LISTS.issuperset(map(type, lists)):
        return None
    return function if all(PLAIN.issuperset(map(type, tensors)) for tensors in lists) else None


def device_of(args: tuple[Any, ...]) -> torch.device:
    """The device of the first tensor among an operator's arguments."""
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.device
        if isinstance(arg, list) and arg:
            return device_of(tuple(arg[:1]))
    raise AssertionError("every operator has a tensor argument")


@functools.cache
def _select(device_type: str, forced: str | None) -> str:
    if forced is None:
        return next(backend for backend in PREFERENCE[device_type] if device_type in devices(backend))
    if forced not in MODULES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={forced!r} is no backend: choose one of {', '.join(MODULES)}")
    if device_type not in devices(forced):
        have = ", ".join(available(device_type))
        raise RuntimeError(
            f"backend {forced!r} was asked for, but cannot run on {device_type} in this installation (it has: {have}); "
            "`python -m erasediff_kernels.info` says what is built"
        )
    return forced


@functools.cache
def _implementation(op: str, device_type: str, forced: str | None) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(load(_select(device_type, forced)), op)
    return function


@functools.cache
def _accepting(op: str, device_type: str, forced: str | None) -> Callable[..., Any] | None:
    if device_type not in PREFERENCE:
        return None
    functions: dict[str, Callable[..., Any]] = getattr(load(_select(device_type, forced)), "ACCEPTING", {})
    return functions.get(op)

"""Registration of the operators, and the choice of the implementation that runs.

A backend is a module with a set `DEVICES` of the device types that it serves in this installation, and a function
`implementation(op)`. For each device type the first backend of `PREFERENCE` that serves it and has the operator wins,
unless `use_backend(...)` or the environment variable `ERASEDIFF_BACKEND` forces one; a forced backend that cannot run
raises instead of falling back.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from erasediff_kernels._library import OPS

NAMESPACE = "erasediff"
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
FROM_ENVIRONMENT = os.environ.get(ENVIRONMENT_VARIABLE) or None


@dataclass(eq=False, slots=True)
class Override:
    """A `use_backend` block that has been entered and not left."""

    backend: str


_overrides: list[Override] = []


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator of the block with one backend.

    The choice holds for the whole process, since autograd runs backward passes in threads of its own. Where blocks of
    several threads overlap, the one entered last wins; a block leaves nothing behind, whatever the order they end in.

    Args:
        name: "compiled", "triton" or "reference".

    Raises:
        ValueError: for another name.
        RuntimeError: from the operator, where the backend cannot serve the device of its tensors.
    """
    if name not in MODULES:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(MODULES)}")
    override = Override(name)
    _overrides.append(override)
    try:
        yield
    finally:
        _overrides.remove(override)


def backend_for(device: torch.device | str, op: str | None = None) -> str:
    """Name of the backend that operators on a device run with now.

    Args:
        device: a device or its type, as "cuda" or torch.device("cuda:1"); it need not exist here.
        op: a name in `torch.ops.erasediff`; None for what the device prefers, which single operators may lack.

    Returns:
        "compiled", "triton" or "reference".

    Raises:
        ValueError: for a device type without kernels, as "mps", "xpu" or "meta".
        RuntimeError: where `use_backend` or ERASEDIFF_BACKEND forces a backend that cannot serve the device.
    """
    return _backend(op, torch.device(device).type, forced())


def available_backends(device: torch.device | str) -> tuple[str, ...]:
    """Names of the backends that serve a device in this installation.

    Args:
        device: as in `backend_for`.

    Returns:
        The preferred backend first, then those that run only when forced; empty for a device type without kernels.
    """
    return available(torch.device(device).type)


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
    try:
        return _overrides[-1].backend
    except IndexError:
        return FROM_ENVIRONMENT


def kernel(op: str) -> Callable[..., Any]:
    """The dispatcher entry of `op`: looks at the device of the first tensor and calls the implementation."""

    def run(*args: Any) -> Any:
        return _implementation(op, device_of(args).type, forced())(*args)

    run.__name__ = op
    return run


PLAIN = frozenset({Tensor, torch.nn.Parameter})
LISTS = frozenset({list, tuple})


def fast_path(op: str, *lists: Sequence[Tensor]) -> Callable[..., Any] | None:
    """The compiled operator on lists that it checks itself, past the dispatcher; its result tells whether it ran.

    It spares thousands of tensors Python's checks and one of two passes through the dispatcher: microseconds per tensor
    that a GPU would wait for. None where something else has to see the call (tracing, modes, subclasses of tensors) or
    another backend is to run.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or not lists[0]:
        return None
    function = _fast_path(op, lists[0][0].device.type, forced())
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


def has_implementation(op: str, backend: str, device_type: str) -> bool:
    """Look up in the table: a backend has an operator for a device type."""
    compiled = {"cpu": "C++", "cuda": "CUDA"}
    language = {"compiled": compiled.get(device_type), "triton": "Triton", "reference": None}[backend]
    return language is None or language in OPS[op].implementations


@functools.cache
def _backend(op: str | None, device_type: str, forced: str | None) -> str:
    if device_type not in PREFERENCE:
        raise ValueError(f"no operator has kernels for {device_type} devices; use {' or '.join(sorted(PREFERENCE))}")
    if forced is None:
        return next(
            backend
            for backend in PREFERENCE[device_type]
            if device_type in devices(backend) and (op is None or has_implementation(op, backend, device_type))
        )
    if forced not in MODULES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={forced!r} is no backend; choose one of {', '.join(MODULES)}")
    if device_type not in devices(forced):
        have = ", ".join(available(device_type))
        raise RuntimeError(
            f"backend {forced!r} was asked for, but cannot run on {device_type} in this installation (it has: {have}); "
            "`python -m erasediff_kernels.info` lists what is built"
        )
    if op is not None and not has_implementation(op, forced, device_type):
        raise RuntimeError(f"backend {forced!r} was asked for, but has no {op} for {device_type}; use another backend")
    return forced


def _module(op: str, device_type: str, forced: str | None) -> ModuleType:
    module = load(_backend(op, device_type, forced))
    assert module is not None, "a backend that serves a device has a module"
    return module


@functools.cache
def _implementation(op: str, device_type: str, forced: str | None) -> Callable[..., Any]:
    function: Callable[..., Any] = _module(op, device_type, forced).implementation(op)
    return function


@functools.cache
def _fast_path(op: str, device_type: str, forced: str | None) -> Callable[..., Any] | None:
    if device_type not in PREFERENCE:
        return None
    functions: dict[str, Callable[..., Any]] = getattr(_module(op, device_type, forced), "FAST_PATH", {})
    return functions.get(op)


# Schemas are defined in Python so that an operator exists whatever was compiled.
for _op, _row in OPS.items():
    torch.library.define(f"{NAMESPACE}::{_op}", _row.schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"{NAMESPACE}::{_op}", ("CPU", "CUDA"), kernel(_op))
    torch.library.register_fake(f"{NAMESPACE}::{_op}", _row.fake)

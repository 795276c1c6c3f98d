"""Batteries by name: every module of this package but ``base`` holds one, called like its file."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from erasediff.audit.batteries.base import Battery


def _battery_of(module: str) -> type[Battery[Any]]:
    """The battery that the module is called for."""
    for value in vars(import_module(f"{__name__}.{module}")).values():
        if (
            isinstance(value, type)
            and issubclass(value, Battery)
            and getattr(value, "name", None) == module.replace("_", "-")
        ):
            return value
    raise ValueError(f"{__name__}.{module} holds no Battery with the name {module.replace('_', '-')!r}")


_found = [_battery_of(module.name) for module in iter_modules(__path__) if module.name != "base"]
BATTERIES: dict[str, type[Battery[Any]]] = {battery.name: battery for battery in sorted(_found, key=lambda b: b.order)}
"""Batteries by name; a new file is listed without a change here."""

__all__ = ["BATTERIES", "Battery"]

import platform
from typing import Annotated, Any

import typer
from rich.table import Table

from erasediff.cli.output import emit, loading, messages, results
from erasediff.config import Config
from erasediff.config.method_index import import_methods, method_index
from erasediff.utils.versions import library_versions


def info(
    config: Annotated[bool, typer.Option("--config", help="Print every setting with its default, as YAML.")] = False,
    methods: Annotated[bool, typer.Option("--methods", help="List the unlearning methods and their settings.")] = False,
    batteries: Annotated[
        bool, typer.Option("--batteries", help="List the batteries of an audit, their sources and settings.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Show versions, devices and which implementation of the operators would run here."""
    if methods:
        _print_methods(as_json)
        return
    if batteries:
        _print_batteries(as_json)
        return
    if config:
        import_methods()
        if as_json:
            emit(Config().model_dump(mode="json"), as_json=True)
        else:
            results.print(Config().to_yaml(), end="", markup=False, soft_wrap=True)
        return
    with loading(messages):
        import torch

        from erasediff.io.cache_dir import cache_folder
        from erasediff_kernels import available_backends
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    facts: dict[str, Any] = {"python": platform.python_version()}
    facts |= library_versions("safetensors", "scikit-learn")
    facts["threads"] = torch.get_num_threads()
    facts["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    facts["operators"] = {device: list(available_backends(device)) for device in devices}
    facts["cache"] = str(cache_folder())
    emit(facts, as_json=as_json)


def _print_methods(as_json: bool) -> None:
    """One row per method, read from the registry without importing torch."""
    entries = method_index().values()
    table = Table("Method", "Summary", "Settings", box=None, padding=(0, 2, 0, 0))
    for entry in entries:
        table.add_row(entry.name, entry.summary, f"{entry.section}.*" if entry.section else "")
    listed = {entry.name: {"summary": entry.summary, "section": entry.section} for entry in entries}
    emit(listed, as_json=as_json, shown=table)


def _print_batteries(as_json: bool) -> None:
    """One row per battery, with its settings as ``--set`` takes them."""
    with loading(messages):
        from erasediff.audit.batteries import BATTERIES
        from erasediff.audit.settings import section_name
    table = Table("Battery", "Source", "Settings", box=None, padding=(0, 2, 0, 0))
    listed = {}
    for name, battery in BATTERIES.items():
        defaults = battery.settings_class().model_dump(mode="json")
        settings = {f"audit.{section_name(name)}.{key}": value for key, value in defaults.items()}
        table.add_row(name, battery.source, "\n".join(f"{key}={value}" for key, value in settings.items()))
        listed[name] = {"title": battery.title, "source": battery.source, "settings": settings}
    emit(listed, as_json=as_json, shown=table)

import platform
from importlib.metadata import version
from typing import Annotated, Any

import typer

from erasediff.cli.output import emit, loading, messages, results
from erasediff.config import Config

LIBRARIES = ("erasediff", "torch", "diffusers", "safetensors", "scikit-learn")


def info(
    config: Annotated[bool, typer.Option("--config", help="Print every setting with its default, as YAML.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Show versions, devices and which implementation of the operators would run here."""
    if config:
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
    found: dict[str, Any] = {"python": platform.python_version()}
    found |= {library: version(library) for library in LIBRARIES}
    found["threads"] = torch.get_num_threads()
    found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    found["operators"] = {device: list(available_backends(device)) for device in devices}
    found["cache"] = str(cache_folder())
    emit(found, as_json=as_json)

"""Report of what is built and which implementation each operator runs here: `python -m erasediff_kernels.info`."""

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch

from erasediff_kernels import _dispatch
from erasediff_kernels._library import OPS

DEVICE_TYPES = tuple(sorted(_dispatch.PREFERENCE))


def collect() -> dict[str, Any]:
    """Everything that `main` prints, as plain data."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cpu": {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()},
        "devices": [describe(index) for index in range(torch.cuda.device_count())],
        "forced_backend": _dispatch.forced(),
        "backends": {name: sorted(_dispatch.devices(name)) for name in _dispatch.MODULES},
        "ops": {op: {device_type: choice(op, device_type) for device_type in DEVICE_TYPES} for op in OPS},
    }


def choice(op: str, device_type: str) -> str:
    """The backend that an operator would use, or the error that it would raise."""
    try:
        return _dispatch.backend_for(device_type, op)
    except (RuntimeError, ValueError) as error:
        return f"error: {error}"


def describe(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def render(info: dict[str, Any]) -> str:
    cpu = info["cpu"]
    rows = [
        ("python", f"{info['python']} on {info['platform']}"),
        ("torch", f"{info['torch']} (CUDA {info['cuda'] or 'no'}, HIP {info['hip'] or 'no'})"),
        ("triton", info["triton"] or "not installed"),
        ("cpu", f"{cpu['threads']} threads, {cpu['capability']}"),
    ]
    rows += [
        (f"cuda:{index}", f"{device['name']}, sm_{device['capability'].replace('.', '')}, {device['memory_gib']} GiB")
        for index, device in enumerate(info["devices"])
    ] or [("cuda", "no device here: the cuda column tells what one would run")]
    rows += [
        (f"backend {name}", ", ".join(devices) if devices else "not available in this installation")
        for name, devices in info["backends"].items()
    ]
    if info["forced_backend"]:
        rows.append((_dispatch.ENVIRONMENT_VARIABLE, f"forces {info['forced_backend']}"))
    lines = [f"{name:<20} {value}" for name, value in rows]
    lines += ["", f"{'operator':<24} {'cpu':<12} cuda"]
    lines += [f"{op:<24} {backends['cpu']:<12} {backends['cuda']}" for op, backends in info["ops"].items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m erasediff_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    info = collect()
    print(json.dumps(info, indent=2) if options.json else render(info))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compile csrc/*.cpp and csrc/cuda/*.cu as C++ over the emulator: the extension, with kernels that run on the CPU.

Objects are kept under build/emulator by the digest of everything that they are made of: what did not change is not
compiled again. A name also holds the digest of the object itself, so one that is damaged is compiled anew.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
EMULATOR = Path(__file__).resolve().parent
CACHE = ROOT / "build" / "emulator"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
FLAGS = ["-std=c++20", "-O1", "-w", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden"]
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030b0000"]
LIBRARIES = ["-ltorch", "-ltorch_cpu", "-lc10"]
PROCESSES = 2


def build(sources: Path = ROOT / "csrc", cache: Path = CACHE) -> Path:
    """The extension's library, compiled or found in the cache."""
    cache.mkdir(parents=True, exist_ok=True)
    files = sorted([*sources.glob("*.cpp"), *sources.glob("cuda/*.cu")])
    with ThreadPoolExecutor(PROCESSES) as pool:
        objects = list(pool.map(partial(compile_object, cache=cache), files))
    folder = Path(torch.__file__).parent
    command = ["-shared", *map(str, objects), f"-L{folder / 'lib'}", *LIBRARIES]
    return cached(cache, digest_of(*(path.read_bytes() for path in objects), flags=LIBRARIES), ".so", command)


def compile_object(source: Path, cache: Path) -> Path:
    folder = Path(torch.__file__).parent / "include"
    includes = [f"-I{EMULATOR}", f"-isystem{folder}", f"-I{sysconfig.get_path('include')}"]
    command = ["-x", "c++", *FLAGS, *DEFINES, *includes, "-c", str(source)]
    read = [*included(source), *sorted(EMULATOR.glob("*.h"))]
    return cached(cache, digest_of(*(path.read_bytes() for path in read), flags=FLAGS + DEFINES), ".o", command)


def included(source: Path, known: tuple[Path, ...] = ()) -> tuple[Path, ...]:
    """A source and the files that it includes by relative path, those within `#if` too, each once."""
    known = (*known, source)
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', source.read_text(), re.MULTILINE):
        header = (source.parent / name).resolve()
        if header not in known:
            known = included(header, known)
    return known


def digest_of(*contents: bytes, flags: Sequence[str]) -> str:
    """SHA-256 of contents, flags and the versions of compiler, torch and Python."""
    assert COMPILER is not None
    compiler = subprocess.run([COMPILER, "--version"], capture_output=True, check=True).stdout
    total = hashlib.sha256()
    for part in (*contents, *map(str.encode, flags), compiler, torch.__version__.encode(), sys.version.encode()):
        total.update(b"%d\n" % len(part) + part)
    return total.hexdigest()


def cached(cache: Path, digest: str, suffix: str, command: Sequence[str]) -> Path:
    """Compile `command`, unless the cache has its output as `digest`.`digest of the file``suffix`."""
    for found in cache.glob(f"{digest}.*{suffix}"):
        if found.name == f"{digest}.{hashlib.sha256(found.read_bytes()).hexdigest()}{suffix}":
            return found
        found.unlink(missing_ok=True)
    assert COMPILER is not None
    partial_file = cache / f"{digest}.{os.getpid()}.partial"
    subprocess.run([COMPILER, *command, "-o", str(partial_file)], check=True)
    content = hashlib.sha256(partial_file.read_bytes()).hexdigest()
    return partial_file.replace(cache / f"{digest}.{content}{suffix}")


if __name__ == "__main__":
    print(build())

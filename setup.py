"""The compiled extension `erasediff_kernels._C`; everything else about the package is in pyproject.toml.

ERASEDIFF_BUILD chooses what is built:
    none  pure Python, with Triton kernels on GPUs
    cpu   the C++ operators
    cuda  the C++ and CUDA operators, for TORCH_CUDA_ARCH_LIST (default: the GPU here, else 8.0, 9.0 and 10.0)
    auto  (default) the most that this machine can build and is likely to run
ERASEDIFF_DEBUG=1 builds what runs on the CPU for a debugger: in a quarter of the time, with symbols, and slow.

Compiled builds need torch at build time: `pip install --no-build-isolation .`
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

CHOICES = ("none", "cpu", "cuda", "auto")
ARCHITECTURES = "8.0;9.0;10.0+PTX"
SOURCES = Path("csrc")

# Contraction would break the bits of the noise, and the equality of all instruction sets. The other two flags change no
# result; they let loops with sqrt and selections vectorise.
CXX_FLAGS = ["-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
CXX_FLAGS += ["-Wno-psabi", "-Wno-maybe-uninitialized"]
NVCC_FLAGS = ["-O3", "--fmad=false", "--threads=2", "-diag-suppress=177"]
# The ABI of torch 2.10, the first with lists of tensors: one library for it and all later versions.
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000")]


def log(message: str) -> None:
    print(f"erasediff: {message}", file=sys.stderr)


def choice() -> str:
    chosen = os.environ.get("ERASEDIFF_BUILD", "auto")
    if chosen not in CHOICES:
        raise SystemExit(f"ERASEDIFF_BUILD={chosen!r}: choose one of {', '.join(CHOICES)}")
    return chosen


def optimization() -> list[str]:
    debug = os.environ.get("ERASEDIFF_DEBUG", "0")
    if debug not in ("0", "1"):
        raise SystemExit(f"ERASEDIFF_DEBUG={debug!r}: choose 0 or 1")
    return ["-O0", "-g"] if debug == "1" else ["-O3", "-g0"]


def why_not_torch() -> str | None:
    try:
        import torch
    except ModuleNotFoundError:
        return "torch is not here at build time: install it, then `pip install --no-build-isolation .`"
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    return None if version >= (2, 10) else f"torch {torch.__version__} is too old: 2.10 is the first with this ABI"


def why_not_cpu() -> str | None:
    compiler = os.environ.get("CXX") or (sysconfig.get_config_var("CXX") or "c++").split()[0]
    if not shutil.which(compiler.split()[0]) and not shutil.which("c++"):
        return f"no C++ compiler ({compiler} or c++) on PATH: install one, or set CXX"
    return None


def cuda_home() -> Path | None:
    """Folder of the CUDA toolkit: CUDA_HOME, or the one that nvcc itself reports, since PATH may hold a link to it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return Path(home) if (Path(home) / "bin" / "nvcc").is_file() else None
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return Path("/usr/local/cuda") if Path("/usr/local/cuda/bin/nvcc").is_file() else None
    report = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", "none"], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.*)$", report.stderr, re.MULTILINE)
    return Path(top[1]).resolve() if top else Path(nvcc).resolve().parent.parent


def why_not_cuda() -> str | None:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a torch that has it"
    home = cuda_home()
    if home is None:
        return "no nvcc: install the CUDA toolkit, or set CUDA_HOME"
    report = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", report)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        found = release[0] if release else "of an unknown release"
        return f"nvcc in {home} is {found}, but torch is for CUDA {torch.version.cuda}: the major versions must match"
    return None


def why_not_by_default() -> str | None:
    """Reason not to build CUDA kernels by default, or None where they are likely to run."""
    import torch

    if torch.cuda.is_available() or os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return None
    return "no GPU here and no TORCH_CUDA_ARCH_LIST"


def target(chosen: str) -> str:
    """The build to make: none, cpu or cuda."""
    if chosen == "none":
        return "none"
    missing = why_not_torch() or why_not_cpu()
    if missing:
        if chosen != "auto":
            raise SystemExit(f"ERASEDIFF_BUILD={chosen} cannot be built: {missing}")
        log(f"building without compiled operators ({missing})")
        return "none"
    if chosen == "cpu":
        return "cpu"
    missing = why_not_cuda()
    if missing and chosen == "cuda":
        raise SystemExit(f"ERASEDIFF_BUILD=cuda cannot be built: {missing}")
    missing = missing or (why_not_by_default() if chosen == "auto" else None)
    if missing:
        log(f"building the C++ operators, not the CUDA ones ({missing}; ERASEDIFF_BUILD=cuda builds them)")
        return "cpu"
    return "cuda"


def cuda_runtime(library_paths: list[str]) -> list[str]:
    """Link arguments for libcudart: torch's wheels bring it with a version in its name only."""
    import torch

    assert torch.version.cuda is not None
    versioned = f"libcudart.so.{torch.version.cuda.split('.')[0]}"
    wheels = Path(torch.__file__).parent.parent / "nvidia"
    candidates = [*wheels.glob("*/lib"), *wheels.glob("cuda_runtime/lib"), *map(Path, library_paths)]
    for folder in candidates:
        if (folder / versioned).is_file():
            return [f"-L{folder}", f"-l:{versioned}"]
    return ["-lcudart"]


def extension(what: str) -> Extension:
    home = cuda_home() if what == "cuda" else None
    if home is not None:
        os.environ["CUDA_HOME"] = str(home)  # torch looks for it on import
    import torch
    from torch.utils import cpp_extension

    sources = [*SOURCES.glob("*.cpp"), *(SOURCES / "cpu").glob("*.cpp")]
    compile_args = {"cxx": [*optimization(), *CXX_FLAGS]}
    link_args = []
    include_dirs = []
    libraries = []
    if home is not None:
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        sources += (SOURCES / "cuda").glob("*.cu")
        compile_args["nvcc"] = [*NVCC_FLAGS, "-DUSE_CUDA"]
        include_dirs.append(str(home / "include"))
        libraries += ["torch_cuda"]
        link_args += cuda_runtime([str(home / "lib64")])
    return cpp_extension.CppExtension(
        "erasediff_kernels._C",
        sorted(map(str, sources)),
        depends=sorted(map(str, (*SOURCES.rglob("*.h"), *SOURCES.rglob("*.inc"), *SOURCES.rglob("*.cuh")))),
        define_macros=MACROS,
        include_dirs=include_dirs,
        libraries=libraries,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        py_limited_api=True,
    )


what = target(choice())
if what == "none":
    setup()
else:
    from torch.utils.cpp_extension import BuildExtension

    setup(
        ext_modules=[extension(what)],
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )

"""The CUDA update without the checks of lists in front of it: types that no kernel exists for are an error."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))

SOURCE = """
#include <torch/csrc/stable/library.h>

#include "cuda/constrained_update.cuh"
#include "shared/constrained_sgd.h"

namespace erasediff::cuda {

template <class T>
using MomentumSgd = Sgd<T, 1>;

struct Make {
  template <class T>
  MomentumSgd<T> operator()(T) const { return MomentumSgd<T>::make(0.1, 0.9, false, 0.0); }
};

using TensorList = std::vector<Tensor>;

void update(const TensorList& params, const TensorList& buffers, const TensorList& retain, const Tensor& one,
            const Tensor& finite, const Tensor& step) {
  const TensorList none;
  constrained_update<MomentumSgd>({params, {&buffers}, {}, retain, none, none, none, none}, Make(), one, one, finite,
                                  step, 0.0, std::nullopt);
}

STABLE_TORCH_LIBRARY(erasediff_unchecked, m) {
  m.def("update(Tensor(a!)[] params, Tensor(b!)[] buffers, Tensor[] retain, Tensor one, Tensor finite, "
        "Tensor(c!) step) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(erasediff_unchecked, CPU, m) { m.impl("update", TORCH_BOX(&update)); }

}  // namespace erasediff::cuda
"""

RUN = """
import sys, torch
torch.ops.load_library(sys.argv[1])
def update(param, buffer):
    p, b = torch.zeros(4, dtype=param), torch.zeros(4, dtype=buffer)
    one, finite = torch.ones(()), torch.tensor(True)
    torch.ops.erasediff_unchecked.update([p], [b], [torch.ones(4)], one, finite, torch.zeros(()))
    return p
assert update(torch.float32, torch.float32).tolist() == [-torch.tensor(0.1).item()] * 4
for types in ((torch.float64, torch.float16), (torch.float32, torch.bfloat16), (torch.float16, torch.int8)):
    try:
        update(*types)
    except RuntimeError as error:
        assert "no kernel for" in str(error), error
    else:
        raise SystemExit(f"{types} were not refused")
"""


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C++ compiler, on Linux")
def test_types_without_a_kernel_are_refused(tmp_path: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    source, library = tmp_path / "update.cpp", tmp_path / "update.so"
    source.write_text(SOURCE)
    includes = [
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'tests/kernels/emulator'}",
        f"-isystem{torch_folder / 'include'}",
        f"-I{sysconfig.get_path('include')}",
    ]
    flags = ["-std=c++20", "-O0", "-w", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([COMPILER, *flags, *includes, source, "-o", library, *libraries], check=True)
    result = subprocess.run([sys.executable, "-c", RUN, library], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]

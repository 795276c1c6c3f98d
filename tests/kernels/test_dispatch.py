import os
import subprocess
import sys

import pytest
import torch

from erasediff_kernels import _dispatch, philox_bits, use_backend
from erasediff_kernels._library import FAKES, OPS, SCHEMAS

IDS, KEY = torch.tensor([1]), torch.tensor([2, 3])


def test_every_backend_has_every_operator() -> None:
    assert set(OPS) == set(SCHEMAS) == set(FAKES)
    for device_type in ("cpu", "cuda"):
        for backend in _dispatch.available(device_type):
            assert [op for op in OPS if not hasattr(_dispatch.load(backend), op)] == []


def test_the_reference_is_always_there() -> None:
    assert "reference" in _dispatch.available("cpu")
    assert "reference" in _dispatch.available("cuda")


def test_default_is_the_first_of_the_table() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "_forced", None)
        assert _dispatch.selected("cpu") == _dispatch.available("cpu")[0]


def test_use_backend_nests_and_restores() -> None:
    before = _dispatch._forced
    with use_backend("reference"):
        assert _dispatch.selected("cpu") == "reference"
        with pytest.raises(ZeroDivisionError), use_backend("triton"):
            raise ZeroDivisionError
        assert _dispatch._forced == "reference"
    assert _dispatch._forced == before


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="compiled, triton, reference"), use_backend("cudnn"):
        pass


@pytest.mark.skipif("triton" in _dispatch.available("cpu"), reason="the interpreter serves the CPU here")
def test_forced_backend_raises_rather_than_falls_back() -> None:
    with use_backend("triton"), pytest.raises(RuntimeError, match="triton"):
        philox_bits(IDS, KEY, 0, 4)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_environment_variable() -> None:
    code = "from erasediff_kernels import _dispatch; print(_dispatch.selected('cpu'))"
    assert run_python(code, ERASEDIFF_BACKEND="reference").stdout.strip() == "reference"
    wrong = run_python(code, ERASEDIFF_BACKEND="fastest")
    assert wrong.returncode != 0
    assert "ERASEDIFF_BACKEND='fastest'" in wrong.stderr

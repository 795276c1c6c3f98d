"""The Triton kernels in Triton's interpreter, put through the tests of the operators on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from erasediff_kernels._library import OPS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = Path(__file__).parent
# An operator's own tests are in the file that hands it to opcheck; 8-bit moments have a file beside them.
OPERATOR_TESTS = [
    path.name
    for path in sorted(HERE.glob("test_*.py"))
    if path.name == "test_moment_codes.py" or any(f"torch.ops.erasediff.{op}.default" in path.read_text() for op in OPS)
]


@pytest.mark.skipif(INTERPRETED, reason="already in the interpreter")
def test_in_the_interpreter() -> None:
    """The interpreter has to be asked for before Triton is imported, hence a process of its own.

    It takes a minute for the losses in float16, which differ from those in bfloat16 by a cast.
    """
    chosen = "cpu-triton and not opcheck and not gradcheck and not (loss and torch.float16)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=40", "-k", chosen]
    result = subprocess.run(
        [*command, "--import-mode=importlib", *(str(HERE / file) for file in OPERATOR_TESTS)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "passed" in result.stdout

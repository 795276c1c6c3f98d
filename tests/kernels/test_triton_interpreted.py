"""The Triton kernels in Triton's interpreter, put through the tests of the operators on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OPERATOR_TESTS = [
    "test_philox.py",
    "test_add_noise.py",
    "test_denoising_loss.py",
    "test_deviation_loss.py",
    "test_gradient_gram.py",
    "test_constraint_multiplier.py",
    "test_constrained_adamw.py",
    "test_constrained_sgd.py",
    "test_moment_codes.py",
    "test_topk_encode.py",
    "test_sparse_decode.py",
]


@pytest.mark.skipif(INTERPRETED, reason="already in the interpreter")
def test_in_the_interpreter() -> None:
    """The interpreter has to be asked for before Triton is imported, hence a process of its own.

    It takes a minute for the losses in float16, which differ from those in bfloat16 by a cast.
    """
    chosen = "cpu-triton and not gradcheck and not (loss and torch.float16)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=40", "-k", chosen]
    here = Path(__file__).parent
    result = subprocess.run(
        [*command, "--import-mode=importlib", *(str(here / file) for file in OPERATOR_TESTS)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "passed" in result.stdout

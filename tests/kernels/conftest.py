"""Every test that asks for `backend` runs once for each implementation that this machine can run, on each device.

With TRITON_INTERPRET=1 the Triton kernels count among them, on the CPU; `test_triton.py` starts that run.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from erasediff_kernels import _dispatch, use_backend


@dataclass(frozen=True, slots=True)
class Backend:
    device: str
    name: str


def runnable_backends() -> list[Backend]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [Backend(device, name) for device in devices for name in _dispatch.available(device)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        backends = runnable_backends()
        metafunc.parametrize("backend", backends, indirect=True, ids=[f"{b.device}-{b.name}" for b in backends])


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with use_backend(request.param.name):
        yield request.param


@pytest.fixture
def device(backend: Backend) -> str:
    return backend.device


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory is full of NaN (of the largest value for integers), also where C++ allocates it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def many(backend: Backend) -> int:
    """How many tiny tensors a list has: thousands, or as many as Triton's interpreter can go through in a second."""
    return 100 if backend.name == "triton" and backend.device == "cpu" else 3000


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def assert_within_twice() -> Callable[[Tensor, Tensor, Tensor], None]:
    """The tolerance for half types: at most twice the error that torch makes in the same dtype, against fp64."""

    def check(actual: Tensor, torch_result: Tensor, exact: Tensor) -> None:
        assert actual.dtype == torch_result.dtype
        error = (actual.double() - exact).abs().max().item() if actual.numel() else 0.0
        torch_error = (torch_result.double() - exact).abs().max().item() if actual.numel() else 0.0
        assert error <= 2.0 * torch_error + 1e-12

    return check

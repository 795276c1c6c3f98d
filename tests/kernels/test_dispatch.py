import dataclasses
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from erasediff_kernels import (
    _dispatch,
    _library,
    available_backends,
    backend_for,
    constrained_adamw_,
    gradient_gram,
    philox_bits,
    use_backend,
)
from erasediff_kernels._library import OPS

IDS, KEY = torch.tensor([1]), torch.tensor([2, 3])


def test_every_backend_has_every_operator() -> None:
    for device_type in ("cpu", "cuda"):
        for backend in available_backends(device_type):
            for op in OPS:
                assert backend == "reference" or _dispatch.has_implementation(op, backend, device_type)
                assert callable(_dispatch.load(backend).implementation(op))


def test_the_reference_is_always_there() -> None:
    assert "reference" in available_backends("cpu")
    assert "reference" in available_backends("cuda")


def test_default_is_the_first_that_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "FROM_ENVIRONMENT", None)
    assert backend_for("cpu") == available_backends("cpu")[0]
    assert backend_for(torch.device("cuda", 3)) == available_backends(torch.device("cuda:3"))[0]


@pytest.mark.parametrize("device", ["meta", "mps", "xpu"])
def test_a_device_type_without_kernels_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=f"no operator has kernels for {device} devices; use cpu or cuda"):
        backend_for(device)
    with use_backend("reference"), pytest.raises(ValueError, match=device):
        backend_for(torch.device(device))
    assert available_backends(device) == ()


def test_an_operator_without_a_kernel_runs_with_the_next_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dataclasses.replace(OPS["philox_bits"], implementations=("CUDA",))
    monkeypatch.setitem(_library.OPS, "philox_bits", row)
    monkeypatch.setattr(_dispatch, "FROM_ENVIRONMENT", None)
    _dispatch._backend.cache_clear()
    try:
        assert backend_for("cpu", "philox_bits") == "reference"
        assert backend_for("cpu") == available_backends("cpu")[0]
        if "compiled" in available_backends("cpu"):
            with use_backend("compiled"), pytest.raises(RuntimeError, match="no philox_bits for cpu"):
                backend_for("cpu", "philox_bits")
    finally:
        _dispatch._backend.cache_clear()


def test_use_backend_nests_and_restores() -> None:
    before = _dispatch.forced()
    with use_backend("reference"):
        assert backend_for("cpu") == "reference"
        with pytest.raises(ZeroDivisionError), use_backend("triton"):
            raise ZeroDivisionError
        assert _dispatch.forced() == "reference"
    assert _dispatch.forced() == before


def test_blocks_of_two_threads_that_overlap_leave_nothing_behind() -> None:
    """The first thread leaves its block while the second is inside one: the second's holds, and then none."""
    before = _dispatch.forced()
    first_entered, second_entered, first_left = (threading.Event() for _ in range(3))
    seen: list[str | None] = []

    def first() -> None:
        with use_backend("reference"):
            first_entered.set()
            assert second_entered.wait(60)

    def second() -> None:
        assert first_entered.wait(60)
        with use_backend("triton"):
            second_entered.set()
            assert first_left.wait(60)
            seen.append(_dispatch.forced())

    threads = threading.Thread(target=first), threading.Thread(target=second)
    for thread in threads:
        thread.start()
    threads[0].join()
    first_left.set()
    threads[1].join()
    assert seen == ["triton"]
    assert _dispatch.forced() == before


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="compiled, triton, reference"), use_backend("cudnn"):
        pass


@pytest.mark.skipif("triton" in available_backends("cpu"), reason="the interpreter serves the CPU here")
def test_forced_backend_raises_rather_than_falls_back() -> None:
    with use_backend("triton"), pytest.raises(RuntimeError, match="triton"):
        philox_bits(IDS, KEY, 0, 4)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_environment_variable() -> None:
    code = "from erasediff_kernels import backend_for; print(backend_for('cpu'))"
    assert run_python(code, ERASEDIFF_BACKEND="reference").stdout.strip() == "reference"
    wrong = run_python(code, ERASEDIFF_BACKEND="fastest")
    assert wrong.returncode != 0
    assert "ERASEDIFF_BACKEND='fastest'" in wrong.stderr


def lists() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [torch.randn(3), torch.randn(4, 5)], [torch.randn(3), torch.randn(4, 5)]


@pytest.mark.skipif("compiled" not in available_backends("cpu"), reason="the C++ operators are not built")
def test_only_plain_lists_in_plain_sight_pass_by_the_dispatcher() -> None:
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    retain, forget = lists()
    with use_backend("compiled"):
        assert _dispatch.fast_path("gradient_gram", retain, forget) is not None
        with Mode():
            assert _dispatch.fast_path("gradient_gram", retain, forget) is None
            gradient_gram(retain, forget)
        assert "erasediff.gradient_gram.default" in seen
        with FakeTensorMode() as fake:
            assert _dispatch.fast_path("gradient_gram", [fake.from_tensor(t) for t in retain], forget) is None
        assert _dispatch.fast_path("gradient_gram", [fake.from_tensor(t) for t in retain], forget) is None
    with use_backend("reference"):
        assert _dispatch.fast_path("gradient_gram", retain, forget) is None


@pytest.mark.skipif("compiled" not in available_backends("cpu"), reason="the C++ operators are not built")
def test_lists_that_are_not_accepted_leave_everything_as_it_was() -> None:
    """Each of them is one that Python refuses with a sentence, or converts first."""
    retain, forget = lists()
    params = [t.clone() for t in retain]
    moments = [torch.zeros_like(p) for p in params]
    scalars = {"multiplier": torch.tensor(0.5), "clip_scale": torch.tensor(1.0), "finite": torch.tensor(True)}
    with use_backend("compiled"):
        for wrong in (
            {"retain": retain[:1]},
            {"retain": [retain[0], retain[1].T]},
            {"exp_avgs": [m.double() for m in moments]},
            {"params": [params[0], params[1][:, ::2]]},
            {"masks": [torch.ones(1, dtype=torch.uint8)] * 2},
            {"lr": torch.tensor([0.1])},
            {"step": torch.tensor(1)},
        ):
            step = torch.tensor(3.0)
            given = {"params": params, "exp_avgs": moments, "exp_avg_sqs": moments, "retain": retain, "forget": forget}
            before = [t.clone() for t in (*params, *moments)]
            with pytest.raises(ValueError, match=r"give|make|use"):
                constrained_adamw_(**{**given, **scalars, "lr": torch.tensor(0.1), "step": step, **wrong})
            assert all(map(torch.equal, before, (*params, *moments)))
            assert step == 3.0
        strided = [forget[0], torch.randn(5, 4).T]
        expected = gradient_gram(retain, [t.contiguous() for t in strided])
        assert torch.equal(gradient_gram(retain, strided), expected)

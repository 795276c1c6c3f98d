import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from erasediff_kernels import _dispatch, constrained_adamw_, gradient_gram, philox_bits, use_backend
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


def lists() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [torch.randn(3), torch.randn(4, 5)], [torch.randn(3), torch.randn(4, 5)]


@pytest.mark.skipif("compiled" not in _dispatch.available("cpu"), reason="the C++ operators are not built")
def test_only_plain_lists_in_plain_sight_pass_by_the_dispatcher() -> None:
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    retain, forget = lists()
    with use_backend("compiled"):
        assert _dispatch.accepting("gradient_gram", retain, forget) is not None
        with Mode():
            assert _dispatch.accepting("gradient_gram", retain, forget) is None
            gradient_gram(retain, forget)
        assert "erasediff.gradient_gram.default" in seen
        with FakeTensorMode() as fake:
            assert _dispatch.accepting("gradient_gram", [fake.from_tensor(t) for t in retain], forget) is None
        assert _dispatch.accepting("gradient_gram", [fake.from_tensor(t) for t in retain], forget) is None
    with use_backend("reference"):
        assert _dispatch.accepting("gradient_gram", retain, forget) is None


@pytest.mark.skipif("compiled" not in _dispatch.available("cpu"), reason="the C++ operators are not built")
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

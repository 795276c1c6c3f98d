"""Properties of the compiled backend: bits that no thread or instruction set changes, no memory, clear errors."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import erasediff_kernels as kernels
from erasediff_kernels import _compiled, _dispatch

pytestmark = pytest.mark.skipif("cpu" not in _compiled.DEVICES, reason="the C++ operators are not built")

SIZES = (1, 7, 0, 1000, 32768, 32769, 100_003, 5)


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    with _dispatch.use_backend("compiled"):
        yield


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tensors(scale: float, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    # Not torch.randn, whose bits do depend on the instruction set.
    generator = torch.Generator().manual_seed(seed)
    integers = [torch.randint(-(1 << 22), 1 << 22, (size,), generator=generator) for size in SIZES]
    return [(i.float() * (scale * 2.0**-21)).to(dtype) for i in integers]


def everything(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Results of all operators on lists of uneven tensors."""
    retain, forget = tensors(1e-2, 1, dtype), tensors(1e-2, 2, dtype)
    gram = kernels.gradient_gram(retain, forget)
    multiplier, clip_scale, _, finite = constraint = kernels.constraint_multiplier(gram, "norm", 0.3, max_norm=1.0)
    params, exp_avgs, ema = tensors(1.0, 3, dtype), tensors(1e-3, 4), tensors(1.0, 5)
    exp_avg_sqs = [m.square() for m in exp_avgs]
    kernels.constrained_adamw_(
        params,
        exp_avgs,
        exp_avg_sqs,
        retain,
        forget,
        multiplier=multiplier,
        clip_scale=clip_scale,
        finite=finite,
        lr=torch.tensor(1e-3),
        step=torch.tensor(4.0),
        weight_decay=0.1,
        ema=ema,
        ema_decay=0.9,
        masks=[kernels.pack_mask(p > 0) for p in params],
        rounding_key=torch.tensor([1, 2]) if dtype != torch.float32 else None,
    )
    ids, key = torch.tensor([3, 1 << 40]), torch.tensor([7, 1])
    noise = kernels.philox_noise(ids, key, 1, (50_001,))
    data, ones = noise.to(dtype), torch.ones(2)
    loss = kernels.denoising_loss(data, data, ones, ones, prediction_type="v_prediction", sample_ids=ids, key=key)
    return [gram, *constraint, *params, *exp_avgs, *exp_avg_sqs, *ema, noise, *loss]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("threads")
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    expected = everything(dtype)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        for result, same in zip(everything(dtype), expected, strict=True):
            assert torch.equal(result, same)


PRINT_BITS = f"""
import hashlib, sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_compiled import everything
from erasediff_kernels import _dispatch
digest = hashlib.sha256()
with _dispatch.use_backend("compiled"):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for t in everything(dtype):
            digest.update(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_same_bits_for_any_instruction_set() -> None:
    digests = {}
    for capability in ("default", "avx2", None):
        environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
        if capability:
            environment["ATEN_CPU_CAPABILITY"] = capability
        command = [sys.executable, "-c", PRINT_BITS]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        digests[capability] = result.stdout
    assert len(set(digests.values())) == 1, digests


def test_step_allocates_only_results() -> None:
    params, retain, forget = tensors(1.0, 1), tensors(1.0, 2), tensors(1.0, 3)
    moments = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    lr, step = torch.tensor(1e-3), torch.tensor(0.0)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        multiplier, clip_scale, _, finite = kernels.constraint_multiplier(kernels.gradient_gram(retain, forget))
        scalars = {"multiplier": multiplier, "clip_scale": clip_scale, "finite": finite, "lr": lr, "step": step}
        kernels.constrained_adamw_(params, *moments, retain, forget, **scalars)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert allocated < 1024  # the Gram values and four scalars


# An editable installation would find its own extension for any copy of the package.
PRINT_DEVICES = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
from erasediff_kernels import _compiled
print(sorted(_compiled.DEVICES))
"""


def test_broken_extension_is_an_error_and_a_missing_one_is_not(tmp_path: Path) -> None:
    package = Path(_compiled.__file__).parent
    copy = tmp_path / "erasediff_kernels"
    copy.mkdir()
    for path in package.iterdir():
        if path.suffix == ".py" or path.is_dir():
            (copy / path.name).symlink_to(path)
    command = [sys.executable, "-c", PRINT_DEVICES]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    missing = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert missing.stdout.strip() == "[]"

    spec = importlib.util.find_spec("erasediff_kernels._C")
    assert spec is not None
    assert spec.origin is not None
    (copy / Path(spec.origin).name).write_bytes(b"not a library")
    broken = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert broken.returncode != 0
    assert "is there but cannot be loaded" in broken.stderr
    assert "pip install --no-build-isolation" in broken.stderr


def test_extension_built_from_other_sources_is_an_error() -> None:
    """As after an update of the Python files alone: an operator of the table that the library does not have."""
    code = """
import erasediff_kernels
from erasediff_kernels._library import OPS
OPS["cube"] = OPS["add_noise"]
for _ in range(2):
    try:
        import erasediff_kernels._compiled
    except ImportError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("was built from other sources: it has no cube for cpu; build it again") == 2

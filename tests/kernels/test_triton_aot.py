"""The checks of `make kernels-aot`, for a few kernels and one GPU generation."""

import dataclasses
import os

import pytest

pytest.importorskip("triton")

import aot_triton as aot
from aot_cases import triton_cases

from erasediff_kernels._library import OPS

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

CASES = {case.name: case for case in triton_cases()}


def test_every_operator_has_a_case() -> None:
    assert [op for op in OPS if not any(name.split()[0] == op for name in CASES)] == []


@pytest.mark.parametrize("name", ["gradient_gram fp32", "constrained_adamw_ fp32", "denoising_loss v bf16"])
def test_no_spills_and_wide_accesses(name: str) -> None:
    report = aot.examine(CASES[name], "sm_90")
    assert report.violations == []
    assert report.registers > 0


def test_violations_are_found() -> None:
    demanding = dataclasses.replace(CASES["constrained_adamw_ fp32"], wide=(1000, 0))
    assert aot.examine(demanding, "sm_90").violations == ["fewer than 1000 loads and 0 stores of 16 bytes"]
    fused = CASES["philox_noise normal fp32"]
    report = aot.Report(case=fused, target="sm_90")
    aot.examine_nvidia(report, aot.compile_case(dataclasses.replace(fused, fused=True), "sm_90"))
    assert report.violations == ["a fused multiply-add in a kernel that draws noise"]

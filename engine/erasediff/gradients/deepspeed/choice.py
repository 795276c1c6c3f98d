"""Which layout an engine has."""

from __future__ import annotations

from typing import Any

from erasediff.gradients.deepspeed.layout import Layout
from erasediff.gradients.deepspeed.partitioned_gradients import PartitionedGradients
from erasediff.gradients.deepspeed.partitioned_parameters import PartitionedParameters
from erasediff.gradients.deepspeed.unsharded import WholeMasters, WholeParameters


def layout_of(engine: Any) -> Layout:
    """The layout of an engine that ``check_engine`` has let pass. ``ValueError`` for an unknown optimizer wrapper."""
    wrapper = type(engine.optimizer).__name__
    if engine.optimizer is engine.basic_optimizer:
        return WholeParameters(engine, engine.basic_optimizer)
    if wrapper == "FP16_UnfusedOptimizer":
        return WholeMasters(engine, engine.optimizer)
    if wrapper == "DeepSpeedZeroOptimizer":
        return PartitionedGradients(engine.optimizer)
    if wrapper == "DeepSpeedZeroOptimizer_Stage3":
        return PartitionedParameters(engine.optimizer)
    if wrapper == "BF16_Optimizer":
        raise ValueError(
            "this DeepSpeed engine keeps gradients in its BF16_Optimizer: use ZeRO stage 2, or stage 1 without "
            '"data_types": {"grad_accum_dtype": "fp32"}'
        )
    raise ValueError(f"this DeepSpeed engine's optimizer is a {wrapper}, which is not known here")

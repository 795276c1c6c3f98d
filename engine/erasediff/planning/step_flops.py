"""FLOPs of one step of EraseDiff, and of plain fine-tuning on as many samples."""

from __future__ import annotations

from dataclasses import dataclass

from erasediff.planning.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFlops:
    """Of the network alone, a multiplication and its addition counted as two.

    The update adds about 30 per trained weight, which is below a thousandth of a pass over one sample.
    """

    retain: int
    forget: int
    teacher: int
    fine_tuning: int

    @property
    def total(self) -> int:
        return self.retain + self.forget + self.teacher


def step_flops(traced: Trace, *, relabel: bool = False) -> StepFlops:
    """Of a step with ``traced.batch_size`` retained and as many forgotten samples.

    relabel: the forget target is a prediction, one more forward pass over the forgotten samples; otherwise it is noise
    """
    return StepFlops(
        retain=traced.pass_flops,
        forget=traced.pass_flops,
        teacher=traced.forward_flops if relabel else 0,
        fine_tuning=2 * traced.pass_flops,
    )

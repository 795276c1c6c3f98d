"""Jobs of the processes in the tests of models without prompts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from checkpoint_cases import peers

from erasediff.config import load_config
from erasediff.parallel.full_weights import full_weights
from erasediff.workflows.build_unlearning import build_unlearning_job

SETTINGS = {
    "threads": 1,
    "unlearn.batch_size": 4,
    "unlearn.lr": 1e-3,
    "images.forget_classes": ["cat"],
}


def unlearn(folder: str, data: str, cache: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Two steps on a folder of classes from the model in ``folder``: what they report, and the weights after them."""
    os.environ["ERASEDIFF_CACHE"] = cache
    peers()
    given = {**SETTINGS, "unlearn.model": Path(folder), "images.data": data, **settings}
    job = build_unlearning_job(load_config(None, given))
    reports = []
    for step in range(2):
        job.rate.apply(job.optimizer, step)
        report = job.method.step(job.retain.at(step), job.forget.at(step))
        reports.append({name: float(value) for name, value in report.scalars().items()})
    return {"reports": reports, "weights": dict(full_weights(job.method.model))}

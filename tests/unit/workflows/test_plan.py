"""The plan of a run against the run itself: the same configuration, FLOPs counted in one real step."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from erasediff.config import for_text_to_image, load_config
from erasediff.errors import UserError
from erasediff.models import stable_diffusion
from erasediff.planning import Network, Trace
from erasediff.planning.trace import flop_counter
from erasediff.workflows.build_unlearning import build_unlearning_job
from erasediff.workflows.plan import plan
from erasediff.workflows.record_passes import step_plan

pytestmark = pytest.mark.usefixtures("one_thread")

BASE = {
    "device": "cpu",
    "images.height": 32,
    "images.width": 32,
    "images.bucket_step": None,
    "images.forget_prompts": ["a cat"],
    "images.retain_prompts": ["a dog"],
    "text_to_image.anchor_prompts": ["a bird"],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "uniform": {"unlearn.target": "uniform"},
    "relabel by the current model": {"unlearn.teacher": "current", "unlearn.retain_target": "true"},
    "relabel by the frozen model": {"unlearn.teacher": "frozen", "unlearn.retain_target": "true"},
    "preserve": {"unlearn.target": "gaussian", "unlearn.retain_target": "teacher"},
    "lora": {"text_to_image.train": "lora", "text_to_image.lora_rank": 2},
    "esd as in the paper": {
        "unlearn.method": "esd",
        "esd.num_inference_steps": 4,
        "esd.latents_from": "current",
        "esd.erase_from": "a dog",
    },
    "inner solve": {"unlearn.barrier": "gap", "unlearn.inner_steps": 2, "unlearn.inner_refresh_every": 1},
    "accumulation": {"unlearn.accumulation_steps": 2},
    "gradient checkpointing": {"text_to_image.gradient_checkpointing": True},
    "training-free pruning": {
        "unlearn.method": "pruning",
        "pruning.variant": "training-free",
        "pruning.observations": 1,
        "pruning.finetune_steps": 3,
        "esd.num_inference_steps": 4,
    },
}


_traces: dict[tuple[object, ...], Trace] = {}


@pytest.fixture(autouse=True)
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes seconds, and most settings leave the pass that is traced as it is."""
    overview = sys.modules["erasediff.planning.overview"]
    trace = overview.trace

    def cached(network: Network, **options: Any) -> Trace:
        parameters = tuple((name, weight.requires_grad) for name, weight in network.module.named_parameters())
        key = network.name, network.resolution, network.dtype, stable_diffusion.CLIP_TOKENS, parameters, str(options)
        if key not in _traces:
            _traces[key] = trace(network, **options)
        return _traces[key]

    monkeypatch.setattr(overview, "trace", cached)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_planned_flops_are_those_of_a_real_step(
    settings: dict[str, Any],
    nano: ModuleType,
    nano_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ERASEDIFF_CACHE", str(tmp_path))
    # The nano tokenizers' length, which the planned networks do not know.
    monkeypatch.setattr(stable_diffusion, "CLIP_TOKENS", nano.TOKENS)
    folder = nano_folder("sd")
    config = load_config(None, {**BASE, **settings, "unlearn.model": str(folder)})
    planned = plan(config, str(folder), ranks=(1,))
    job = build_unlearning_job(config, rehearse=True)
    # The first step may sample what later ones go on from, or only observe.
    trial = job.trial_steps(2)
    next(trial)
    with flop_counter() as counter:
        next(trial)
    assert next(trial, None) is None
    assert planned.flops.total == pytest.approx(counter.get_total_flops(), rel=0.02)
    trained = [parameter for parameter in job.network.parameters() if parameter.requires_grad]
    assert planned.parameters_trained == sum(parameter.numel() for parameter in trained)


def test_the_default_run_has_two_teacher_passes() -> None:
    """Retained predictions are preserved and forgotten ones relabelled, both by the frozen original."""
    step = step_plan(for_text_to_image(load_config()))
    assert step.samples(network="model", gradient=True) == 2 * step.batch_size == 8
    assert step.samples(network="teacher") == 2 * step.batch_size
    assert step.samples(network="teacher", data="forget") == step.batch_size
    assert step.teacher
    assert step.rows(nested=True) == step.batch_size, "the relabelled target is predicted beside the model's graph"


def test_memory_has_the_teacher_that_the_run_keeps(nano_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = str(nano_folder("sd"))

    def teacher(**settings: Any) -> int:
        overrides = {name.replace("__", "."): value for name, value in settings.items()}
        return plan(load_config(None, {**BASE, **overrides}), folder, ranks=(1,)).rows[0].memory.teacher

    whole = plan(load_config(None, {**BASE, "text_to_image.train": "full"}), folder, ranks=(1,))
    assert whole.rows[0].memory.teacher == 4 * whole.parameters
    partial = plan(load_config(None, BASE), folder, ranks=(1,))
    assert partial.rows[0].memory.teacher == 4 * partial.parameters_trained, "frozen weights are shared"
    lora = plan(load_config(None, {**BASE, "text_to_image.train": "lora"}), folder, ranks=(1,))
    assert lora.rows[0].memory.teacher == 4 * lora.parameters_trained
    assert teacher(unlearn__target="uniform", unlearn__retain_target="true") == 0
    assert teacher(unlearn__method="finetune") == 0
    assert teacher(unlearn__method="esd") > 0


def test_an_inner_solve_is_shared_by_the_steps_that_use_it() -> None:
    settings = {"unlearn.target": "uniform", "unlearn.barrier": "gap", "unlearn.inner_steps": 3}

    def forget_samples(refresh: int) -> float:
        overrides = {**settings, "unlearn.inner_refresh_every": refresh, "unlearn.batch_size": 2}
        step = step_plan(for_text_to_image(load_config(None, overrides)))
        assert step.state_bytes == 4, "the copy that the inner solve moves"
        return step.samples(gradient=True, data="forget")

    assert forget_samples(1) == 2 + 3 * 2
    assert forget_samples(3) == pytest.approx(2 + 3 * 2 / 3)


def test_planning_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    step_plan(for_text_to_image(load_config()))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_run_refuses_is_not_planned(nano_folder: Callable[[str], Path]) -> None:
    folder = str(nano_folder("sd"))
    with pytest.raises(UserError, match="no optimizer steps"):
        plan(load_config(None, {"unlearn.method": "saemnesia"}), folder)
    with pytest.raises(UserError, match="square"):
        plan(load_config(None, {"images.height": 32}), folder)
    with pytest.raises(UserError, match="omit --target"):
        plan(load_config(None, {"unlearn.method": "salun", "unlearn.target": "uniform"}), folder)

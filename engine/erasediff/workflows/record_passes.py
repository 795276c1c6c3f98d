"""Record the network passes of a configured method by running its step on a stand-in network.

The method is built as a run builds it, so that its plan cannot differ from what it does; only the network is replaced
by one of four weights, which costs milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from erasediff.config import Config
from erasediff.diffusion.batch import Batch
from erasediff.diffusion.noise_schedule import Process
from erasediff.errors import UserError
from erasediff.methods import METHOD_SPECS
from erasediff.methods.pruning import PruningConfig
from erasediff.models.trainable import frozen_copy
from erasediff.planning.step_plan import Pass, StepPlan, merge_passes, run_precision
from erasediff.workflows.build_method import UnlearningModel, method_parameters, unlearning_method
from erasediff.workflows.latent_data import NoiseBatches
from erasediff.workflows.prompted_run import relabelling
from erasediff_kernels import ConstrainedAdamW

CONDITION = "encoder_hidden_states"
RETAIN, FORGET = 0.0, 1.0
"""Values of the condition that distinguish the two batches."""
SHAPE = (1, 1, 2)


class StandInNetwork(nn.Module):
    """Denoiser of one linear layer, a stand-in for any network whose passes are counted."""

    config: Mapping[str, Any] = {}

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(SHAPE[-1], SHAPE[-1], bias=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls()

    def forward(self, sample: Tensor) -> Tensor:
        prediction: Tensor = self.layer(sample)
        return prediction


class StandInPrompts:
    """Prompt encoder of the stand-in, which distinguishes prompts to forget from all others."""

    def __init__(self, forget_prompts: Sequence[str]) -> None:
        self.forget_prompts = forget_prompts

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        values = [FORGET if prompt in self.forget_prompts else RETAIN for prompt in prompts]
        return {CONDITION: torch.tensor(values).view(-1, 1, 1)}


class PassRecorder:
    """Denoiser that records each call."""

    def __init__(self, trained: nn.Module) -> None:
        self.trained = trained
        self.passes: list[Pass] = []
        self._graph_alive = False
        self._data: Literal["retain", "forget"] = "retain"

    def __call__(self, model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor:
        gradient = torch.is_grad_enabled() and model is self.trained
        nested = self._graph_alive and not gradient
        # A relabelled target has another condition than the batch that it is for.
        if not nested:
            self._data = "forget" if bool((condition[CONDITION] == FORGET).any()) else "retain"
        self.passes.append(
            Pass(
                network="model" if model is self.trained else "teacher",
                gradient=gradient,
                data=self._data,
                rows=noisy_sample.shape[0],
                nested=nested,
            )
        )
        prediction: Tensor = model(noisy_sample)
        if gradient:
            self._graph_alive = True
            prediction.register_hook(self._note_backward)  # type: ignore[no-untyped-call]
        return prediction

    def _note_backward(self, _: Tensor) -> None:
        self._graph_alive = False


def step_plan(config: Config) -> StepPlan:
    """Plan of the step that ``config.unlearn`` describes, for one of ``config.distributed.processes``.

    Args:
        config: Configuration with every default of the kind of model filled in, as a run has it.

    Raises:
        UserError: For a method without steps, and for settings that the method refuses.
    """
    if METHOD_SPECS[config.unlearn.method].build is None:
        raise UserError(f"{config.unlearn.method} takes no optimizer steps to plan; choose another --method.")
    with torch.random.fork_rng(devices=[]):
        return _recorded(_for_stand_in(config), config)


def _for_stand_in(config: Config) -> Config:
    """Adapt ``config`` to the stand-in: one process, and no settings of a real model's weights."""
    prompts = config.images.forget_prompts or ("forget",)
    changes: dict[str, Any] = {
        "images": config.images.model_copy(update={"forget_prompts": prompts}),
        "text_to_image": config.text_to_image.model_copy(update={"anchor_prompts": ("anchor",)}),
        "unlearn": config.unlearn.model_copy(update={"batch_size": process_batch_size(config)}),
    }
    pruning = config.section(PruningConfig)
    if pruning.mask is not None:
        # The same step, reached by observations instead of a file.
        changes["pruning"] = pruning.model_copy(update={"mask": None, "observations": 1, "finetune_steps": 1})
    return config.model_copy(update=changes)


def process_batch_size(config: Config) -> int:
    """Retained samples per process."""
    distributed = config.distributed
    return config.unlearn.batch_size // (1 if distributed.launch == "none" else distributed.processes)


def _save_nothing(_: Path) -> None:
    raise AssertionError("a stand-in is never saved")


def _recorded(stand_in: Config, config: Config) -> StepPlan:
    settings, network = config.unlearn, StandInNetwork()
    parameters = method_parameters(stand_in, network, ["layer.weight"])
    optimizer = ConstrainedAdamW(
        parameters, lr=1e-3, ema_decay=settings.ema_decay, moments=settings.moments, seed=config.seed
    )
    teachers: list[nn.Module] = []

    def teacher() -> nn.Module:
        if not teachers:
            teachers.append(frozen_copy(network, share_frozen=True))
        return teachers[0]

    prompts = StandInPrompts(stand_in.images.forget_prompts)
    recorder = PassRecorder(network)
    rows = stand_in.unlearn.batch_size
    retain, forget = (
        NoiseBatches({"sample": torch.ones(rows, *SHAPE), CONDITION: torch.full((rows, 1, 1), value)})
        for value in (RETAIN, FORGET)
    )
    model = UnlearningModel(
        network=network,
        process=Process.from_scheduler(DDPMScheduler()),
        predict=recorder,
        save=_save_nothing,
        relabel=lambda make_teacher: relabelling(stand_in, prompts.encode_prompts, make_teacher),
        encode_prompts=prompts.encode_prompts,
        latent_shape=lambda: SHAPE,
    )
    method = unlearning_method(stand_in, model, network, optimizer, teacher=teacher, retain=retain, forget=forget)
    # The first steps may only observe, or sample what all later ones go on from.
    report = method.step(retain.at(0), forget.at(0))
    while report.grad_norm is None and method.iteration < (settings.steps or 1):
        report = method.step(retain.at(0), forget.at(0))
    recorder.passes.clear()
    steps = settings.inner_refresh_every
    for _ in range(steps):
        method.step(retain.at(0), forget.at(0))
    return StepPlan(
        method=settings.method,
        train=config.text_to_image.train,
        precision=run_precision(config),
        batch_size=rows,
        accumulation_steps=settings.accumulation_steps,
        passes=merge_passes(recorder.passes, steps),
        teacher=bool(teachers),
        gradients=1 if report.multiplier is None else 2,
        moment_bytes=8 if settings.moments == "float" else 2,
        state_bytes=_state_bytes(method),
        averages=settings.ema_decay is not None,
        gradient_checkpointing=config.text_to_image.gradient_checkpointing,
    )


def _state_bytes(method: Any) -> int:
    """Bytes per trained element of the method's state besides weight, moments and average."""
    solver = getattr(method, "tuned", method)
    state = next(iter(solver.optimizer.state.values()))
    tensors = next(solver.shards()).tensors
    return sum(tensor.element_size() for name, tensor in tensors.items() if name != "weight" and name not in state)

"""ESD: the target's formula, the pool of trajectories against one sampled alone, and the command line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from nano import FAMILY_EXAMPLES
from safetensors.torch import load_file
from torch import nn

from erasediff.diffusion import NegativeGuidance, Process, Trajectories
from erasediff.methods import ESD
from erasediff.models.trainable import select
from erasediff_kernels import ConstrainedAdamW

SHAPE = (1, 2, 3)


def esd(model: nn.Module, process: Process, **options: Any) -> ESD:
    return ESD(
        model,
        ConstrainedAdamW(model.parameters(), lr=1e-2),
        process=process,
        shape=SHAPE,
        **{
            "teacher": copy.deepcopy(model).requires_grad_(False).eval(),
            "concepts": {"class_labels": torch.tensor([1, 2])},
            "null": {"class_labels": torch.tensor([5])},
            "batch_size": 4,
            "num_inference_steps": 10,
            "seed": 3,
            **options,
        },
    )


def test_the_target_in_both_conventions() -> None:
    concept, null, other = torch.randn(3, 2, 1, 2, 3).unbind()
    paper = NegativeGuidance(eta=1.0).target(concept, null)
    torch.testing.assert_close(paper, 2 * null - concept)
    torch.testing.assert_close(NegativeGuidance(eta=2.0, convention="repository").target(concept, null), paper)
    torch.testing.assert_close(NegativeGuidance(eta=1.0, convention="repository").target(concept, null), null)
    torch.testing.assert_close(NegativeGuidance(eta=0.5).target(concept, null, other), other - 0.5 * (concept - null))
    with pytest.raises(ValueError, match="eta"):
        NegativeGuidance(eta=-1.0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_step_of_a_trajectory_is_the_sampler_of_diffusers(prediction_type: str) -> None:
    scheduler = DDIMScheduler(
        num_train_timesteps=100,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    scheduler.set_timesteps(10)
    process = Process.from_scheduler(scheduler)
    pool = Trajectories(process, SHAPE, torch.arange(3), total=3, steps=10, seed=0)
    assert pool.timesteps.tolist() == scheduler.timesteps.tolist()
    sample, prediction = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(0)).unbind()
    step = torch.tensor([0, 4, 8])
    expected = [
        scheduler.step(p[None], scheduler.timesteps[s], x[None]).prev_sample[0]
        for p, x, s in zip(prediction, sample, step.tolist(), strict=True)
    ]
    torch.testing.assert_close(pool.moved(sample, prediction, step), torch.stack(expected))


def test_a_step_of_a_flow_is_eulers() -> None:
    process = Process.from_scheduler(FlowMatchEulerDiscreteScheduler(num_train_timesteps=100, shift=3.0))
    pool = Trajectories(process, SHAPE, torch.arange(2), total=2, steps=10, seed=0)
    sample, velocity = torch.randn(2, 2, *SHAPE).unbind()
    before, after = process.sigma[pool.timesteps[3]], process.sigma[pool.timesteps[4]]
    moved = pool.moved(sample, velocity, torch.tensor([3, 3]))
    torch.testing.assert_close(moved, sample + (after - before) * velocity)


def test_the_pool_covers_all_of_time_at_every_iteration(process: Process) -> None:
    pool = Trajectories(process, SHAPE, torch.arange(5), total=5, steps=10, seed=0)
    for iteration in range(25):
        _, step = pool.places(iteration)
        assert (step.sort().values.diff() == 2).all()
    numbers = torch.stack([pool.places(iteration)[0] for iteration in range(60)])
    # Each trajectory is in one slot, for as many iterations as it has steps, unless the run begins or ends in it.
    assert numbers.unique(return_counts=True)[1].max() == 10


def test_a_pool_state_is_the_trajectory_sampled_alone(model: nn.Module, process: Process) -> None:
    method = esd(model, process, guidance_scale=2.5)
    for _ in range(13):
        method.step()
    pool = method.trajectories
    states = method.states()
    number, step = pool.places(method.iteration)
    for slot in range(4):
        noise = pool.noise(method.iteration)[slot : slot + 1]
        label = torch.tensor([[1], [2]])[number[slot] % 2]
        for index in range(int(step[slot])):
            times = process.conditioning[pool.timesteps[index]][None]
            with torch.no_grad():
                concept = method.teacher(noise, times, class_labels=label)[0]
                null = method.teacher(noise, times, class_labels=torch.tensor([5]))[0]
            noise = pool.moved(noise, null + 2.5 * (concept - null), torch.tensor([index]))
        torch.testing.assert_close(states[slot], noise[0])


def test_the_loss_is_the_distance_to_the_target(model: nn.Module, process: Process) -> None:
    method = esd(model, process, guidance=NegativeGuidance(eta=0.7))
    sample, times = method.states().clone(), method.trajectories.times(0)
    labels = torch.tensor([1, 2])[method.trajectories.places(0)[0] % 2]
    with torch.no_grad():
        concept = model(sample, times, class_labels=labels)[0]
        null = model(sample, times, class_labels=torch.full((4,), 5))[0]
    report = method.step()
    expected = (concept - (null - 0.7 * (concept - null))).square().mean()
    torch.testing.assert_close(report.forget_loss, expected)


def test_the_concept_comes_to_be_predicted_as_the_target_says(model: nn.Module, process: Process) -> None:
    method = esd(model, process, batch_size=16)
    losses = [float(method.step().forget_loss) for _ in range(150)]
    assert sum(losses[-20:]) < 0.3 * sum(losses[:20])


@pytest.mark.parametrize("latents_from", ["frozen", "current"])
def test_resumed_is_uninterrupted_bit_for_bit(
    make_model: Callable[[], nn.Module], process: Process, latents_from: str
) -> None:
    whole, again = make_model(), make_model()
    method, resumed = (esd(model, process, latents_from=latents_from) for model in (whole, again))
    for _ in range(7):
        method.step()
    again.load_state_dict(copy.deepcopy(whole.state_dict()))
    resumed.load_state_dict(copy.deepcopy(method.state_dict()))
    for _ in range(7):
        method.step()
        resumed.step()
    for first, second in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second)


def test_a_pool_that_was_not_kept_is_sampled_again(make_model: Callable[[], nn.Module], process: Process) -> None:
    """Restart with another number of processes: only the frozen model's weights and Philox are needed."""
    method = esd(make_model(), process)
    for _ in range(12):
        method.step()
    kept = method.states().clone()
    method.trajectories.iteration = None
    torch.testing.assert_close(method.states(), kept)


def test_two_processes_hold_the_pool_of_one(process: Process) -> None:
    whole = Trajectories(process, SHAPE, torch.arange(6), total=6, steps=10, seed=2)
    parts = [Trajectories(process, SHAPE, torch.arange(3) + 3 * rank, total=6, steps=10, seed=2) for rank in (0, 1)]
    for iteration in (0, 4, 17):
        assert torch.equal(whole.noise(iteration), torch.cat([part.noise(iteration) for part in parts]))
        assert torch.equal(whole.times(iteration), torch.cat([part.times(iteration) for part in parts]))


# Equal bits are those of a CPU: attention's backward pass on a GPU adds up in no fixed order.
NANO = """
device: cpu
threads: 1
images: {height: 32, width: 32}
unlearn: {steps: 3, batch_size: 2, lr: 1e-3}
esd: {num_inference_steps: 4}
run: {log_every: 1, checkpoint_every: 1}
"""


@pytest.mark.usefixtures("here", "one_thread")
@pytest.mark.parametrize("name", FAMILY_EXAMPLES)
def test_a_prompt_alone_is_enough(run: Callable[..., None], name: str, nano_folder: Callable[[str], Path]) -> None:
    source = nano_folder(name)
    erase = ("--method", "esd", "--forget-prompts", "a sneaker;a shoe", "--set", "esd.erase_from=a boot")
    run("unlearn", "--model", source, *erase, "--train", "esd-x", "--out", "out", "--config", "nano.yaml")
    before, after = DiffusionPipeline.from_pretrained(source), DiffusionPipeline.from_pretrained("out/model")
    component = "unet" if hasattr(before, "unet") else "transformer"
    network, erased = getattr(before, component), getattr(after, component).state_dict()
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, erased[name])}
    assert moved
    assert moved <= set(select(network, "xattn"))


@pytest.mark.usefixtures("one_thread")
def test_resumed_from_a_checkpoint_ends_with_the_same_files(
    run: Callable[..., None], here: Path, nano_folder: Callable[[str], Path]
) -> None:
    erase = ("--method", "esd", "--forget-prompts", "a sneaker", "--config", "nano.yaml")
    for out in ("whole", "part"):
        run("unlearn", "--model", nano_folder("sd"), *erase, "--out", out)
    run("unlearn", "--resume", "part/checkpoint-2")
    first, second = (load_file(here / f"{out}/checkpoint-3/state.safetensors") for out in ("whole", "part"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("here", "one_thread")
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--method", "esd"), "--forget-prompts"),
        (("--method", "finetune", "--set", "esd.eta=2"), "The method finetune does not read esd.eta, a setting of esd"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(
    run: Callable[..., None],
    flags: tuple[str, ...],
    said: str,
    nano_folder: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = "nano.yaml" if "esd" in flags else None
    chosen = ("--config", config) if config else ()
    run("unlearn", "--model", nano_folder("sd"), *flags, "--out", "out", *chosen, code=2)
    assert said in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_pool_before_its_first_step_is_known_memory_and_is_sampled_after_a_restore(
    make_model: Callable[[], nn.Module], process: Process
) -> None:
    """A run saved before its first step has no states yet; the one that resumes from it samples them."""
    saved, resumed, fresh = (esd(make_model(), process) for _ in range(3))
    (shard,) = saved.own_shards()
    assert torch.equal(shard.tensors["trajectories"], torch.zeros_like(shard.tensors["trajectories"]))
    (restored,) = resumed.own_shards()
    restored.tensors["trajectories"].copy_(shard.tensors["trajectories"])
    resumed.load_scalars(saved.scalars())
    assert torch.equal(resumed.states(), fresh.states())
    assert saved.state_dict()["trajectories"] is None


def test_without_a_teacher_nothing_can_be_predicted_from(model: nn.Module, process: Process) -> None:
    with pytest.raises(ValueError, match="needs a teacher"):
        esd(model, process, teacher=None)
    with pytest.raises(ValueError, match="frozen"):
        esd(model, process, teacher=model)

"""Default anchor: the retained caption under which the model denoises the forgotten images best."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from erasediff.diffusion import Batch, NoiseRole, Process, noise_key
from erasediff.workflows.anchor_selection import CANDIDATES, _candidates, _captions_apart, condition_losses
from erasediff_kernels import philox_noise

NANO = """
threads: 1
images: {height: 32, width: 32, bucket_step: 16, images_per_prompt: 2}
unlearn: {batch_size: 2, lr: 1e-3}
sample: {num_inference_steps: 1}
run: {log_every: 1}
"""


def denoise(model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor:
    """The answer is the condition itself, whatever it is asked."""
    return condition["prompt"].expand_as(noisy_sample) + 0 * condition["size"].expand_as(noisy_sample)


def test_losses_are_those_of_every_condition_on_the_same_noisy_images(process: Process) -> None:
    count, draws = 3, 2
    batch = {
        "sample": torch.randn(count, 1, 2, 3, generator=torch.Generator().manual_seed(0)),
        "prompt": torch.full((count, 1, 1, 1), 9.0),
        "size": torch.zeros(count, 1, 1, 1),
    }
    conditions = {"prompt": torch.tensor([0.0, 0.3, -2.0]).reshape(3, 1, 1, 1)}
    losses = condition_losses(nn.Module(), batch, conditions, process=process, denoiser=denoise, draws=draws, seed=5)
    noise = torch.stack(
        [
            philox_noise(torch.arange(count), noise_key(5, draw, "cpu"), int(NoiseRole.ANCHOR), (1, 2, 3)).double()
            for draw in range(draws)
        ]
    )
    expected = torch.stack([(noise - answer).square().mean() for answer in conditions["prompt"].double()])
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("draws", "lengths"), [(0, (2, 2)), (1, (2, 3))])
def test_misuse_is_refused(draws: int, lengths: tuple[int, int], process: Process) -> None:
    conditions = {name: torch.zeros(length, 1) for name, length in zip(("a", "b"), lengths, strict=True)}
    with pytest.raises(ValueError, match="one length"):
        condition_losses(nn.Module(), {"sample": torch.zeros(1, 1, 2, 3)}, conditions, process=process, draws=draws)


def test_candidates_are_the_frequent_captions_and_some_of_all_parts_of_the_others() -> None:
    captions = ["often"] * 3 + [f"once {number}" for number in range(1000)] + ["", "", ""]
    candidates = _candidates(captions)
    assert len(candidates) == len(set(candidates)) == CANDIDATES
    assert candidates[0] == "often"
    assert "" not in candidates
    numbers = [int(caption.split()[1]) for caption in candidates[1:]]
    gaps = {after - before for before, after in pairwise(numbers)}
    assert gaps <= {15, 16}
    assert _candidates(["a", "b", "a"]) == ["a", "b"]


def test_a_caption_of_a_forgotten_image_is_no_candidate() -> None:
    """Relabelled to its own caption, an image would not be forgotten at all."""
    assert _captions_apart(["a cat", "a dog", "a cat"], ["a cat"]) == ["a dog"]
    assert _captions_apart(["a cat", ""], ["a cat"]) == [""]


@pytest.mark.usefixtures("here", "one_thread")
def test_the_command_line_chooses_among_the_retained_captions_and_remembers(
    run: Callable[..., None], nano_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A caption that makes the forgotten images is the nearest, and a resumed run finds it in its configuration."""
    command = ("unlearn", "--model", nano_folder("sd"), "--config", "nano.yaml", "--steps", 2)
    prompts = ("--forget-prompts", "a cat", "--retain-prompts", "a dog;a bird")
    run(*command, *prompts, "--out", "out", "--set", "run.checkpoint_every=1")
    said: Any = capsys.readouterr().err
    chosen = next(prompt for prompt in ("a dog", "a bird") if f'Anchor: "{prompt}"' in said)
    assert f"anchor_prompts:\n  - {chosen}\n" in Path("out/config.yaml").read_text()
    run("unlearn", "--resume", "out/checkpoint-1", "--json")
    captured = capsys.readouterr()
    assert "Anchor" not in captured.err
    assert json.loads(captured.out)["steps_taken"] == 1

    run(*command, *prompts, "--dry-run")
    assert "Anchor" not in capsys.readouterr().err

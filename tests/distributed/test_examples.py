"""Every example runs as its first lines and the examples' README say, and leaves weights that diffusers loads."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from forked import Forked, script
from placing import environment, on_gpus

EXAMPLES = Path(__file__).parents[2] / "examples"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# DeepSpeed would compile its shared memory for ranks on a CPU, which takes longer than all examples.
SCRIPT = str(Path(__file__).with_name("without_shared_memory.py"))
ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--use_deepspeed", "--num_processes", "2"),
    *("--main_process_port", "0", "--deepspeed_config_file", str(EXAMPLES / "zero2.json")),
    SCRIPT,
]
COMMANDS = {
    "plain_pytorch.py": (1, [sys.executable]),
    "accelerate_deepspeed.py": (2, ACCELERATE),
    "deepspeed_engine.py": (2, [*TORCHRUN, SCRIPT]),
    "fsdp2.py": (2, TORCHRUN),
    "diffusers_text_to_image.py": (1, [sys.executable]),
}
"""Number of processes and launcher of each example."""
SECONDS = 240


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> UNet2DConditionModel:
    sys.path.insert(0, str(EXAMPLES))
    import tiny

    return tiny.unet()


def launched(command: list[str], folder: Path, variables: dict[str, str]) -> str:
    """Standard output of a launcher and its processes, which have to end well."""
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


def forked(arguments: list[str], processes: int, variables: dict[str, str]) -> str:
    """Standard output of ``processes`` with the environment that torchrun gives them."""
    ranks: list[dict[str, str]] = [{}]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        world |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        ranks = [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    started = [Forked(script, arguments, {**variables, **rank}) for rank in ranks]
    ended = [process.communicate(timeout=SECONDS) for process in started]
    for process, (_, errors) in zip(started, ended, strict=True):
        assert process.returncode == 0, errors
    return "".join(output for output, _ in ended)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_example(name: str, tmp_path: Path, start: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    processes, launcher = COMMANDS[name]
    variables = {**os.environ, **environment(processes), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if launcher is ACCELERATE or on_gpus(processes):
        output = launched([*launcher, str(EXAMPLES / name)], tmp_path, variables)
    else:
        monkeypatch.chdir(tmp_path)
        own_script = [SCRIPT] if SCRIPT in launcher else []
        output = forked([*own_script, str(EXAMPLES / name)], processes, variables)
    assert "retain" in output
    saved = tmp_path / "unlearned"
    if name == "diffusers_text_to_image.py":
        unet = StableDiffusionPipeline.from_pretrained(saved, safety_checker=None).unet
    else:
        unet = UNet2DConditionModel.from_pretrained(saved)
    for (key, weight), (_, before) in zip(unet.named_parameters(), start.named_parameters(), strict=True):
        assert torch.isfinite(weight).all(), key
        torch.testing.assert_close(weight, before, rtol=0.5, atol=0.05)
    assert any(not torch.equal(a, b) for a, b in zip(unet.parameters(), start.parameters(), strict=True))

"""Runs of several processes from the command line: started by it or by others, stopped, failing, and mistaken."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import SECONDS, TINY, WIDEST, curve, finish, run, start, weights
from diffusers import DDPMPipeline
from placing import environment, on_gpus

ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "erasediff.cli"),
    "accelerate": (
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu" if on_gpus(WIDEST) else "--cpu",
        "--num_processes=2",
        "--num_machines=1",
        "-m",
        "erasediff.cli",
    ),
    "deepspeed": ("-m", "deepspeed.launcher.runner", "--num_gpus=2", "--module", "erasediff.cli"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A folder with settings, a link to the base model, and an unlearning run on one process."""
    home = tmp_path_factory.mktemp("home")
    (home / "tiny.yaml").write_text(TINY)
    (home / "base").symlink_to(base)
    run(*unlearn(home), "--out", home / "one")
    return home


def unlearn(home: Path) -> tuple[object, ...]:
    return ("unlearn", "--model", home / "base", "--config", home / "tiny.yaml", "--json")


def assert_same_curve(out: Path, home: Path) -> None:
    found, expected = curve(out), curve(home / "one")
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("resumptions", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ranks_do_what_one_process_does_and_only_one_speaks(home: Path, tmp_path: Path, resumptions: int) -> None:
    launch = ("--launch", "zero", "--stage", 2, "--processes", 2)
    output, errors = run(*unlearn(home), "--out", tmp_path / "run", *launch, new_interpreter=True)
    assert json.loads(output)["steps_taken"] == 12
    request, warning, progress = errors.strip().splitlines()
    assert request.startswith("Request: forgetting ")
    assert warning.startswith("Warning: in 12 steps of ")
    assert progress.count("12/12") == 1
    assert_same_curve(tmp_path / "run", home)
    one = weights(home / "one")
    for name, weight in weights(tmp_path / "run").items():
        torch.testing.assert_close(weight, one[name], rtol=0, atol=2e-5)
    assert DDPMPipeline.from_pretrained(tmp_path / "run/model").unet.config.num_class_embeds == 11

    resumed = tmp_path / "run"
    elsewhere = (4, ("--launch", "none")), (8, ("--launch", "zero", "--stage", 3, "--processes", 3))
    for step, flags in elsewhere[:resumptions]:
        run("unlearn", "--resume", resumed / f"checkpoint-{step}", *flags)
        assert_same_curve(resumed, home)
    for name, weight in weights(resumed).items():
        torch.testing.assert_close(weight, one[name], rtol=0, atol=2e-5)


def test_ranks_that_diverge_end_with_one_sentence_and_no_model(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    diverging = ("--lr", 1e30, "--launch", "ddp", "--processes", 2)
    output, errors = run(*unlearn(home), "--out", out, *diverging, code=3)
    assert output == ""
    assert errors.count("steps were skipped since their gradients were not finite") == 1
    assert not (out / "model").exists()


def test_ranks_end_with_one_verdict_and_its_exit_code(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    quick = ("--retain-class", "5", "--set", "verdict.images=4", "--set", "sample.num_inference_steps=1")
    output, errors = run(*unlearn(home), "--out", out, "--verdict", *quick, "--launch", "ddp", "--processes", 2, code=3)
    verdict = json.loads((out / "verdict.json").read_text())
    assert json.loads(output)["verdict"] == verdict["verdict"]
    assert errors.count("Verdict: ") >= 1
    assert errors.count("Error: ") == errors.count("The model is ") == 1
    assert verdict["model"].startswith("model-")
    assert [path.name for path in out.glob("model*")] == [verdict["model"]]


@pytest.mark.parametrize(
    "layout", [("ddp",), *(pytest.param(each, marks=pytest.mark.slow) for each in (("fsdp",), ("zero", "--stage", 3)))]
)
def test_ranks_that_collapse_stop_together_and_roll_back(
    home: Path, tmp_path: Path, layout: tuple[object, ...]
) -> None:
    out = tmp_path / "run"
    limits = ("--set", "run.look_every=2", "--set", "run.drift_limit=1.5")
    collapsing = ("--lr", 3, "--set", "unlearn.warmup_steps=12", *limits)
    output, errors = run(*unlearn(home), "--out", out, *collapsing, "--launch", *layout, "--processes", 2, code=3)
    assert output == ""
    assert errors.count("no longer denoised after step 6") == 1
    assert errors.count("the weights of step 2 ") == 1
    assert len(curve(out)) == 6
    assert not (out / "model").exists()
    shutil.copytree(out / "rolled-back/model", tmp_path / "good/model")
    run(*unlearn(home), "--out", tmp_path / "one", *collapsing, code=3)
    shutil.copytree(tmp_path / "one/rolled-back/model", tmp_path / "expected/model")
    good, expected = (
        torch.cat([weight.flatten() for weight in weights(tmp_path / name).values()]) for name in ("good", "expected")
    )
    # At such a rate, Adam amplifies the rounding of small gradients.
    assert float((good - expected).norm()) < 1e-2 * float(expected.norm())


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LAUNCHERS))
def test_other_launchers_start_the_same_run(home: Path, tmp_path: Path, name: str) -> None:
    # As a flag, --launch would be one of deepspeed's own.
    asked = ("--set", "distributed.launch=ddp")
    output, _ = run(*unlearn(home), "--out", tmp_path / "run", *asked, launcher=LAUNCHERS[name])
    assert output.count('"steps_taken": 12') == 1
    assert_same_curve(tmp_path / "run", home)


SRUN = """#!/usr/bin/env bash
[[ $1 == --kill-on-bad-exit=1 ]] && shift
nodes=()
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node "$@" &
    nodes+=($!)
done
for node in "${nodes[@]}"; do
    wait "$node" || exit
done
"""


@pytest.mark.slow
def test_the_slurm_script_runs_on_two_nodes_and_goes_on_when_requeued(home: Path, tmp_path: Path) -> None:
    """Each with an agent and ranks of its own, on this machine: what Slurm itself does is played by two scripts."""
    for name, text in {"srun": SRUN, "scontrol": "#!/usr/bin/env bash\necho localhost\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = free.getsockname()[1] % 20000
    slurm = {"PATH": path, "SLURM_NNODES": "2", "SLURM_GPUS_PER_NODE": "1", "SLURM_JOB_ID": str(job)}
    slurm |= {"SLURM_JOB_NODELIST": "localhost", "LAUNCH": "zero", "STAGE": "2"}
    variables = {**os.environ, **environment(WIDEST), **slurm, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = ["bash", str(ROOT / "benchmarks/slurm/nodes.sh")]
    out = tmp_path / "run"
    asked = [*map(str, unlearn(home)[1:]), "--out", str(out)]
    ended = subprocess.run(
        [*script, *asked], env=variables, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert ended.stdout.count('"steps_taken": 12') == 1
    assert_same_curve(out, home)
    whole = weights(out)

    shutil.rmtree(out / "model")
    for step in (12, 8):
        shutil.rmtree(out / f"checkpoint-{step}")
    variables["SLURM_RESTART_COUNT"] = "1"
    ended = subprocess.run(
        [*script, "--out", str(out)], env=variables, capture_output=True, timeout=SECONDS, check=False
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert_same_curve(out, home)
    torch.testing.assert_close(weights(out), whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--forget", 11), "no class 11"),
        pytest.param(
            ("--method", "pruning", "--set", "pruning.objective=erasediff"),
            "runs in one process, since",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_mistake_that_ranks_find_is_one_sentence_and_leaves_nothing(
    home: Path, tmp_path: Path, flags: tuple[object, ...], sentence: str
) -> None:
    out = tmp_path / "run"
    output, errors = run(*unlearn(home), "--out", out, "--launch", "ddp", "--processes", 2, *flags, code=2)
    assert output == ""
    assert errors.count("Error:") == 1
    assert sentence in errors
    assert "Traceback" not in errors
    assert not out.exists()


def test_a_crash_is_told_by_the_rank_that_crashed(home: Path, tmp_path: Path) -> None:
    script = tmp_path / "crashing.py"
    script.write_text(
        "import os\n"
        "from erasediff.methods import EraseDiff\n"
        "step = EraseDiff.step\n"
        "def crash(self, retain, forget):\n"
        "    if os.environ['RANK'] == '1' and self.iteration == 5:\n"
        "        raise KeyError('this one')\n"
        "    return step(self, retain, forget)\n"
        "EraseDiff.step = crash\n"
        "from erasediff.cli import main\n"
        "main()\n"
    )
    launcher = (*LAUNCHERS["torchrun"][:-2], str(script))
    process = start(*unlearn(home), "--out", tmp_path / "run", "--launch", "ddp", launcher=launcher)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert errors.count("An unexpected error, which is a fault of erasediff and not yours (KeyError: 'this one')") == 1
    assert "KeyError: 'this one'" in (tmp_path / "run/crash-rank-1.log").read_text()
    assert "Connection closed" not in errors
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-4"]


def test_ctrl_c_stops_all_ranks_after_the_same_step(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    long = ("--steps", 2000, "--launch", "ddp", "--processes", 2)
    process = start(*unlearn(home), "--out", out, *long)
    deadline = time.monotonic() + SECONDS
    while not (out / "checkpoint-4").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = finish(process, 130)
    assert errors.count("Stopped after step") == 1
    assert "--resume latest" in errors
    assert "Traceback" not in errors
    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    assert len(curve(out)) == json.loads((last / "manifest.json").read_text())["step"]

"""The command line: what it prints, what it leaves behind, and the one sentence that a mistake gets."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import DDPMPipeline
from helpers import Ended, succeed
from PIL import Image

TINY = """
threads: 1
model: {block_out_channels: [8, 8], layers_per_block: 1}
train: {steps: 4, batch_size: 8}
unlearn: {steps: 3, batch_size: 8}
sample: {num_inference_steps: 2}
evaluate: {per_class: 2, forgotten: 4, unconditional: 12}
run: {checkpoint_every: 2}
"""


Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``tiny.yaml``, and the runs ``base`` (conditional) and ``plain`` (unconditional)."""
    home = tmp_path_factory.mktemp("home")
    (home / "tiny.yaml").write_text(TINY)
    for name, flags in (("base", []), ("plain", ["--unconditional"])):
        succeed("train", "--out", home / name, "--config", home / "tiny.yaml", *flags)
    return home


@pytest.fixture(autouse=True)
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test in an empty folder of its own, with links to what ``home`` holds."""
    monkeypatch.chdir(tmp_path)
    for name in ("tiny.yaml", "base", "plain"):
        (tmp_path / name).symlink_to(home / name)
    return tmp_path


def test_a_run_leaves_a_folder_that_plain_diffusers_loads(home: Path) -> None:
    assert sorted(path.name for path in (home / "base").iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
        "config.yaml",
        "metrics.jsonl",
        "model",
        "receipt.json",
    ]
    pipeline = DDPMPipeline.from_pretrained(home / "base" / "model")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.unet.config.num_class_embeds == 11


def test_unlearning_keeps_the_format_of_the_model(run: Run, here: Path) -> None:
    ended = run(
        "unlearn", "--model", "base/model", "--forget", "3,5", "--out", "out", "--config", "tiny.yaml", "--json"
    )
    assert ended.code == 0
    told = json.loads(ended.output)
    assert (told["model"], told["steps_taken"]) == ("out/model", 3)
    assert told["metrics"]["multiplier"] >= 0
    before, after = (json.loads((here / name / "model/unet/config.json").read_text()) for name in ("base", "out"))
    assert {k: v for k, v in before.items() if k[0] != "_"} == {k: v for k, v in after.items() if k[0] != "_"}


@pytest.mark.parametrize(
    "flags",
    [
        ("--method", "finetune"),
        ("--method", "neggrad"),
        # With a relabelled target the gap is closed before the first step here, and nothing would change.
        ("--barrier", "gap", "--target", "uniform"),
        ("--barrier", "fixed", "--eta", "1"),
        ("--barrier", "cosine"),
        ("--target", "gaussian"),
        ("--target", "relabel"),
        ("--target", "relabel", "--set", "unlearn.teacher=current"),
        ("--set", "precision=bfloat16"),
        (
            "--set",
            "unlearn.accumulation_steps=2",
            "--set",
            "unlearn.min_snr_gamma=5",
            "--set",
            "unlearn.antithetic=true",
        ),
        ("--set", "unlearn.ema_decay=null"),
    ],
)
def test_every_way_to_unlearn_runs(run: Run, flags: tuple[str, ...]) -> None:
    ended = run(
        "unlearn", "--model", "base/model", "--forget", "3", "--out", "out", "--config", "tiny.yaml", "--json", *flags
    )
    assert ended.code == 0, ended.errors
    assert json.loads(ended.output)["metrics"]["finite"] is True


def test_an_unconditional_model_unlearns_samples_and_is_judged(run: Run) -> None:
    common = ("--config", "tiny.yaml", "--json")
    assert run("unlearn", "--model", "plain/model", "--forget", "3", "--out", "out", *common).code == 0
    assert run("sample", "--model", "out/model", "--count", "5", "--out", "grid.png", *common).code == 0
    judged = json.loads(
        run("evaluate", "--model", "out/model", "--base", "plain/model", "--forget", "3", *common).output
    )
    assert judged["model"]["count"] == judged["base"]["count"] == 12


def test_a_grid_has_a_row_per_class(run: Run) -> None:
    ended = run("sample", "--model", "base/model", "--classes", "0,1,2", "--count", "5", "--out", "a/grid.png")
    assert ended.code == 0
    assert Image.open("a/grid.png").size == (5 * 9 * 4, 3 * 9 * 4)
    again = run("sample", "--model", "base/model", "--classes", "0,1,2", "--count", "5", "--out", "again.png", "--json")
    assert json.loads(again.output)["images"] == 15
    assert Path("a/grid.png").read_bytes() == Path("again.png").read_bytes()


def test_single_images_go_to_a_folder(run: Run) -> None:
    assert run("sample", "--model", "base/model", "--classes", "7", "--count", "2", "--out", "images").code == 0
    assert sorted(path.name for path in Path("images").iterdir()) == ["class-7-00000.png", "class-7-00001.png"]


def test_evaluation_compares_with_the_base(run: Run) -> None:
    command = ("evaluate", "--model", "base/model", "--base", "base/model", "--forget", "3", "--config", "tiny.yaml")
    judged = json.loads(run(*command, "--json").output)
    assert judged["model"] == judged["base"]
    assert judged["model"]["asked"] == [2, 2, 2, 4, 2, 2, 2, 2, 2, 2]
    assert 0.9 < judged["judge"]["accuracy"] <= 1
    shown = run(*command).output
    assert "class 3 (forgotten)" in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("command", [("train",), ("unlearn", "--model", "base/model", "--forget", "3")])
def test_a_dry_run_plans_and_writes_nothing(run: Run, here: Path, command: tuple[str, ...]) -> None:
    before = sorted(here.rglob("*"))
    ended = run(*command, "--config", "tiny.yaml", "--dry-run", "--json")
    plan = json.loads(ended.output)
    assert plan["parameters"] == plan["parameters_trained"] > 0
    assert plan["state_bytes"] >= 4 * 4 * plan["parameters"]  # weights, two moments and their average in float32
    assert plan["seconds"] == pytest.approx(plan["seconds_per_step"] * plan["steps"])
    assert sorted(here.rglob("*")) == before
    assert run(*command, "--config", "tiny.yaml", "--dry-run").code == 0


def test_info(run: Run) -> None:
    assert json.loads(run("info", "--json").output)["erasediff"]
    assert "train:" in run("info", "--config").output


def test_demo_from_nothing_and_from_the_cache(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERASEDIFF_CACHE", str(here / "cache"))
    first = run("demo", "--config", "tiny.yaml", "--json")
    assert first.code == 0, first.errors
    told = json.loads(first.output)
    assert told["run"] == "runs/demo-1"
    columns = {"base", "erasediff", "finetune", "neggrad", "retrained"}
    assert columns < told.keys()
    assert "erasediff demo --config tiny.yaml" in Path("runs/demo-1/report.html").read_text()
    assert json.loads(Path("runs/demo-1/evaluation.json").read_text())["base"] == told["base"]
    assert "Training" in first.errors

    second = run("demo", "--config", "tiny.yaml", "--json")
    assert "Training" not in second.errors
    again = json.loads(second.output)
    assert again["run"] == "runs/demo-2"
    assert {name: again[name] for name in columns} == {name: told[name] for name in columns}

    shutil.rmtree("runs/demo-2/controls/neggrad/model")
    Path("runs/demo-2/report.html").unlink()
    resumed = run("demo", "--resume", "latest", "--json")
    assert resumed.code == 0, resumed.errors
    assert "Unlearning (neggrad)" in resumed.errors
    assert "Unlearning (erasediff)" not in resumed.errors
    assert json.loads(resumed.output) == again
    assert Path("runs/demo-2/report.html").exists()


UNLEARN = ("unlearn", "--model", "base/model", "--out", "out", "--config", "tiny.yaml")
IN_TWO = ("--forget", "3", "--launch", "ddp", "--processes", "2")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("train", "--out", "out", "--set", "train.step=3"), "did you mean train.steps?"),
        (("train", "--out", "out", "--set", "train.steps"), "section.key=value"),
        (("train", "--out", "out", "--lr", "-1"), '"train.lr" cannot be -1'),
        (("train", "--out", "out", "--config", "absent.yaml"), "Cannot read the configuration absent.yaml"),
        (("train", "--out", "out", "--exclude", "12"), "no class 12"),
        (("train", "--out", "out", "--exclude", "0,1,2,3,4,5,6,7,8,9"), "Nothing is left to retain"),
        (("train", "--out", "out", "--device", "abacus"), 'no device "abacus"'),
        (("train", "--out", "out", "--device", "meta"), "no operator has kernels for meta devices; use cpu or cuda"),
        (("train",), "--out"),
        (("train", "--out", "base"), "is not empty"),
        (("train", "--out", "tiny.yaml/deeper", "--config", "tiny.yaml"), "Cannot write"),
        (("train", "--out", "out", "--resume", "latest"), "no run to resume in out"),
        (("train", "--resume", "latest"), "--out"),
        (("train", "--resume", "base", "--lr", "1"), "started with another train.lr"),
        ((*UNLEARN, "--forget", "11"), "no class 11"),
        ((*UNLEARN, "--forget", "three"), "whole numbers"),
        ((*UNLEARN, "--forget", ""), "Nothing to forget"),
        (UNLEARN, "Nothing to forget"),
        ((*UNLEARN, "--forget", "3", "--retain", "2,3"), "The forget set and the retain set share"),
        ((*UNLEARN, "--forget", "0,1,2,3,4,5,6,7,8,9"), "Nothing is left to retain"),
        ((*UNLEARN, "--forget", "3", "--method", "magic"), "'salun' or 'selective-amnesia'"),
        # Before any of the processes is started.
        ((*UNLEARN, *IN_TWO, "--batch-size", "5"), "unlearn.batch_size is 5, which 2 processes cannot share"),
        ((*UNLEARN, *IN_TWO, "--offload", "optimizer"), "--launch ddp cannot offload its optimizer"),
        ((*UNLEARN, *IN_TWO, "--offload", "params"), "--launch ddp keeps parameters on every device"),
        ((*UNLEARN, "--offload", "optimizer"), "--launch none cannot offload its optimizer"),
        (
            (*UNLEARN, "--processes", "2"),
            "--processes is for --launch ddp, fsdp or zero, but this run has --launch none",
        ),
        ((*UNLEARN, *IN_TWO, "--stage", "1"), "--stage is for --launch zero, but this run has --launch ddp"),
        (("train", "--out", "out", "--deepspeed-config", "own.json"), "--deepspeed-config is for --launch zero"),
        (
            (*UNLEARN, "--forget", "3", "--launch", "zero", "--deepspeed-config", "own.json"),
            "Cannot read the DeepSpeed",
        ),
        ((*UNLEARN, "--launch", "fsdp", "--offload", "optimizer"), "FSDP offloads optimizer and parameters together"),
        (("unlearn", "--forget", "3", "--out", "out"), "--model"),
        (("unlearn", "--model", "absent", "--forget", "3", "--out", "out"), "absent does not exist"),
        (
            ("unlearn", "--model", "plain/model", "--forget", "3", "--out", "out", "--target", "relabel"),
            "needs a class-conditional model",
        ),
        (("sample", "--model", "base/model", "--classes", "10", "--out", "out"), "no class 10"),
        (("sample", "--model", "base/model", "--classes", "", "--out", "out"), "Name at least one class"),
        (("sample", "--model", "plain/model", "--classes", "1", "--out", "out"), "unconditional"),
        (("evaluate", "--model", "base/model", "--forget", "10"), "no class 10"),
        (("evaluate", "--model", "base/model", "--base", "plain/model", "--forget", "3"), "cannot be compared"),
        (("demo", "--forget", "10", "--out", "out"), "no class 10"),
        (("demo", "--resume", "latest"), "no run to resume"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    run: Run, here: Path, command: tuple[str, ...], said: str
) -> None:
    ended = run(*command)
    assert ended.code == 2
    assert said in ended.errors
    assert ended.errors.strip().startswith("Error: ")
    assert ended.errors.strip().count("\n") == 0
    assert ended.output == ""
    assert sorted(path.name for path in here.iterdir()) == ["base", "plain", "tiny.yaml"]


@pytest.mark.parametrize("arguments", [("train", "--no-such-flag"), ("no-such-command",), ("sample",)])
def test_a_wrong_flag_is_also_code_2(run: Run, arguments: tuple[str, ...]) -> None:
    assert run(*arguments).code == 2


def test_a_damaged_model_is_one_sentence(run: Run, here: Path) -> None:
    assert run("train", "--out", "own", "--config", "tiny.yaml").code == 0
    weights = here / "own/model/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    ended = run("unlearn", "--model", "own/model", "--forget", "3", "--out", "out")
    assert ended.code == 2
    assert (
        "Error: own/model/unet/diffusion_pytorch_model.safetensors cannot be read as safetensors: it is cut short"
        in ended.errors
    )
    assert not (here / "out").exists()


def test_a_damaged_checkpoint_is_one_sentence_with_a_way_out(run: Run, here: Path) -> None:
    assert run("train", "--out", "own", "--config", "tiny.yaml").code == 0
    whole = (here / "own/model/unet/diffusion_pytorch_model.safetensors").read_bytes()
    state = here / "own/checkpoint-4/state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"!")
    ended = run("train", "--out", "own", "--resume", "latest")
    assert ended.code == 2
    assert ended.errors.strip() == (
        "Error: The checkpoint own/checkpoint-4 is damaged; continue from the one before it with "
        "--resume own/checkpoint-2."
    )
    assert run("train", "--resume", "own/checkpoint-2").code == 0
    assert (here / "own/model/unet/diffusion_pytorch_model.safetensors").read_bytes() == whole


def test_a_full_disk_is_one_sentence_and_keeps_the_last_checkpoint(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 12
    real = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        ended = run("train", "--out", "own", "--config", "tiny.yaml")
    assert ended.code == 2
    assert "The disk is full" in ended.errors
    assert "Traceback" not in ended.errors
    assert not [path for path in (here / "own").iterdir() if path.name.startswith(".")]
    assert (here / "own/checkpoint-2/manifest.json").exists()
    assert run("train", "--out", "own", "--resume", "latest").code == 0
    assert (here / "own/metrics.jsonl").read_bytes() == (here / "base/metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--method", "esd", "--eta", 2), "does not read unlearn.eta: set esd.eta."),
        (
            ("--method", "esd", "--barrier", "gap"),
            "does not read unlearn.barrier: it reads unlearn.{accumulation_steps,",
        ),
        (("--method", "finetune", "--target", "uniform"), "does not read unlearn.target"),
        (("--method", "salun", "--set", "unlearn.inner_steps=2"), "does not read unlearn.inner_steps"),
        (("--set", "saemnesia.k=8"), "The method erasediff does not read saemnesia.k, a setting of saemnesia"),
    ],
)
def test_a_setting_that_the_method_does_not_read_is_refused(
    run: Run, here: Path, flags: tuple[object, ...], sentence: str
) -> None:
    ended = run("unlearn", "--model", "base/model", "--forget", 3, "--out", "out", "--config", "tiny.yaml", *flags)
    assert ended.code == 2
    assert sentence in " ".join(ended.errors.split())
    assert not (here / "out").exists()


def test_a_runs_own_configuration_is_not_a_persons_choice(run: Run, here: Path) -> None:
    """It lists every setting, with the defaults of the kind of model and of the method that it had."""
    first = ("unlearn", "--model", "base/model", "--forget", 3, "--config", "tiny.yaml", "--method", "finetune")
    assert run(*first, "--out", "out").code == 0
    assert "eta: 0.5" in (here / "out/config.yaml").read_text()
    assert run("unlearn", "--resume", "out/checkpoint-2").code == 0
    again = ("unlearn", "--config", "out/config.yaml", "--method", "neggrad", "--out", "again")
    refused = run(*again, "--eta", 2)
    assert refused.code == 2
    assert "The method neggrad does not read unlearn.eta" in " ".join(refused.errors.split())
    assert run(*again).code == 0


def test_a_precision_of_weights_is_for_text_to_image_models(run: Run, here: Path) -> None:
    for command in (("train",), ("unlearn", "--model", "base/model", "--forget", 3)):
        ended = run(*command, "--out", "out", "--config", "tiny.yaml", "--set", "precision=bf16-true")
        assert ended.code == 2
        assert "set precision to bf16-mixed or fp32" in " ".join(ended.errors.split())
    assert not (here / "out").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["unlearn", "--help"], ["info", "--methods"]])
def test_help_waits_for_no_heavy_import(arguments: list[str]) -> None:
    code = f"""
import sys
for name in ("torch", "diffusers", "sklearn", "matplotlib"):
    sys.modules[name] = None
sys.argv = ["erasediff", *{arguments}]
from erasediff.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "selective-amnesia" in done.stdout or "unlearn" in done.stdout

"""Runs that end with a verdict, by the real command line: exit code, name of the model, files, flags, resuming."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import Ended, succeed
from pictures import class_pictures
from PIL import Image

TINY = """
device: cpu
threads: 1
model: {block_out_channels: [8, 8], layers_per_block: 1}
train: {steps: 3, batch_size: 4}
unlearn: {forget: [3], retain: [5], steps: 3, batch_size: 4, target: uniform, lr: 1.0e-3}
images: {height: 32, width: 32, bucket_step: 16, caption_template: "a {class}"}
sample: {num_inference_steps: 1}
run: {log_every: 1}
verdict: {images: 12}
"""
JUDGES = """
calls = 0
def shows_forgotten(images, labels):
    return [0] * len(images)
def shows_others(images, labels):
    return [1] * len(images)
def shows_the_first_time(images, labels):
    # Of the original's forgotten images alone.
    global calls
    calls += 1
    return [0 if calls == 1 else 1] * len(images)
"""
Run = Callable[..., Ended]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("base")
    (home / "tiny.yaml").write_text(TINY)
    succeed("train", "--out", home / "run", "--config", home / "tiny.yaml")
    return home / "run/model"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("ERASEDIFF_CACHE", str(tmp_path / "cache"))
    name = f"judges_of_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(JUDGES)
    monkeypatch.setenv("JUDGES", name)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


@pytest.fixture
def judge(place: Path) -> Callable[[str], str]:
    return lambda function: f"{next(place.glob('judges_of_*.py')).stem}:{function}"


def command(model: Path, *flags: object) -> tuple[object, ...]:
    return ("unlearn", "--model", model, "--config", "tiny.yaml", "--out", "out", "--json", "--verdict", *flags)


def facts(name: str = "out") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(name, "verdict.json").read_text())
    return found


def files(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in ("verdict.json", "verdict.jsonl", "report.html")}


@pytest.mark.parametrize(
    ("function", "code", "name"),
    [
        ("shows_the_first_time", 0, "model"),
        ("shows_forgotten", 3, "model-not-forgotten"),
        # It sees nothing in what the original draws.
        ("shows_others", 3, "model-unproven"),
    ],
)
def test_a_judge_decides_on_exit_code_and_name(
    run: Run, base: Path, judge: Callable[[str], str], function: str, code: int, name: str
) -> None:
    ended = run(*command(base, "--judge", judge(function)))
    assert ended.code == code, ended.errors
    result = json.loads(ended.output)
    assert Path(result["model"]).name == facts()["model"] == name
    assert (Path("out") / name / "unet").is_dir()
    assert [path.name for path in Path("out").glob("model*")] == [name]
    assert result["verdict"] == facts()["verdict"]
    assert [by["name"] for by in facts()["judges"]][1:] == ["original"]
    rows = [json.loads(line) for line in Path("out/verdict.jsonl").read_text().splitlines()]
    assert {row["judge"] for row in rows} == {by["name"] for by in facts()["judges"]}
    assert ("Error: " in ended.errors) == (code == 3)
    assert "Forgetting 3" in Path("out/report.html").read_text()


def test_a_model_that_did_not_pass_is_called_as_asked(run: Run, base: Path, judge: Callable[[str], str]) -> None:
    ended = run(*command(base, "--judge", judge("shows_forgotten"), "--keep", "kept"))
    assert (ended.code, facts()["model"]) == (3, "kept")
    assert Path("out/kept/unet").is_dir()
    assert not Path("out/model").exists()


def test_without_a_verdict_there_are_no_files_of_one(run: Run, base: Path) -> None:
    ended = run(*[word for word in command(base) if word != "--verdict"], "--no-verdict")
    assert ended.code == 0
    assert "verdict" not in json.loads(ended.output)
    assert Path("out/model").is_dir()
    assert not list(Path("out").glob("verdict*")) + list(Path("out").glob("report*"))


def test_a_run_killed_between_model_and_verdict_gets_it_when_resumed(
    run: Run, base: Path, judge: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from erasediff.workflows import end_of_run

    asked = command(base, "--judge", judge("shows_forgotten"))
    assert run(*asked).code == 3
    whole = files(Path("out"))
    shutil.rmtree("out")
    with monkeypatch.context() as patch:
        patch.setattr(end_of_run, "examine_run", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*asked).code not in (0, 3)
    assert Path("out/model").is_dir()
    assert not Path("out/verdict.json").exists()
    ended = run("unlearn", "--resume", "latest", "--out", "out", "--json", "--verdict")
    assert ended.code == 3, ended.errors
    resumed = files(Path("out"))
    assert resumed["verdict.jsonl"] == whole["verdict.jsonl"]
    assert json.loads(resumed["verdict.json"]) == json.loads(whole["verdict.json"])


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (("--set", "output.layout=single-file"), "model-not-forgotten.safetensors"),
        (("--train", "lora", "--set", "text_to_image.lora_rank=2"), "model-not-forgotten"),
    ],
)
def test_text_to_image_runs_in_each_format_are_judged(
    run: Run,
    nano_folder: Callable[[str], Path],
    place: Path,
    judge: Callable[[str], str],
    flags: tuple[str, ...],
    name: str,
) -> None:
    Path("tiny.yaml").write_text(TINY.replace("forget: [3], retain: [5], ", ""))
    data = class_pictures(place / "data")
    shown = judge("shows_forgotten")
    ended = run(*command(nano_folder("sd"), "--data", data, "--forget-class", "cat", "--judge", shown, *flags))
    assert ended.code == 3, ended.errors
    assert facts()["model"] == name
    assert (Path("out") / name).exists()
    assert facts()["sought"] == ["cat"]
    assert "Forgetting cat" in Path("out/report.html").read_text()
    # The LoRA has the name that diffusers looks for.
    assert Path("out/lora.safetensors").exists() == ("lora" in flags)


@pytest.mark.parametrize("name", ["sd", "flux", "ddpm_class", "dit", "ddpm_unconditional", "ldm"])
def test_listed_files_of_each_family_are_compared_with_unseen_ones(
    run: Run, nano_folder: Callable[[str], Path], place: Path, name: str
) -> None:
    Path("tiny.yaml").write_text(TINY.replace("forget: [3], retain: [5], ", ""))
    grey = name == "ddpm_unconditional"
    data = class_pictures(place / "data", grey=grey)
    unseen = class_pictures(place / "unseen", grey=grey, count=3)
    for path in unseen.rglob("*.png"):
        # Another image of the class.
        Image.open(path).rotate(90).save(path)
    Path("request.txt").write_text("bird/0.png\nbird/1.png\n")
    sizes = () if name in ("sd", "flux") else ("--set", "images.height=null", "--set", "images.width=null")
    ended = run(
        *command(nano_folder(name), "--data", data, "--forget-files", "request.txt", *sizes),
        "--unseen-data", unseen,
    )  # fmt: skip
    assert ended.code == 3, ended.errors
    found = facts()
    assert (found["kind"], found["forgotten"], found["model"]) == ("files", "cannot tell", "model-unproven")
    figures = {figure["key"]: figure for figure in found["figures"]}
    assert found["settings"]["images"]["forgotten"] == 2
    assert found["settings"]["images"]["unseen"] == 9
    rows = [json.loads(line) for line in Path("out/verdict.jsonl").read_text().splitlines()]
    losses = {
        model: {
            of: [row["loss"] for row in rows if (row.get("set"), row["model"]) == (of, model)]
            for of in ("forgotten", "unseen")
        }
        for model in ("before", "after")
    }
    for model, of in losses.items():
        lower = [a < b for a in of["forgotten"] for b in of["unseen"]]
        assert figures["auc_unseen"][model]["value"] == pytest.approx(sum(lower) / len(lower))
    assert {row["asked"] for row in rows if row["judge"] == "reproduction"} == (
        {None} if name in ("ddpm_unconditional", "ldm") else {"a bird"} if name in ("sd", "flux") else {"bird"}
    )


def test_unseen_data_are_looked_for_before_the_first_step(run: Run, base: Path) -> None:
    ended = run(*command(base, "--unseen-data", "nowhere/at/all"))
    assert ended.code == 2
    assert "nowhere/at/all" in ended.errors
    assert not Path("out").exists()

"""An audit through the command line: any model, its page, resuming, sharing among processes, and mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import run_command, succeed
from lora_cases import QUERY, low_rank
from PIL import Image
from safetensors.torch import save_file

from erasediff.audit import BATTERIES
from erasediff.models.load import load_text_to_image

NANO = """
threads: 1
images: {height: 32, width: 32, bucket_step: 16}
unlearn: {steps: 2, batch_size: 2, lr: 1e-3}
sample: {num_inference_steps: 2, guidance_scale: 2}
audit:
  images: 2
  concept_images: 4
  most_prompts: 1
  templates: ["the {}"]
  inversion: {steps: 2, batch_size: 2, starts: [""]}
  noise: {etas: [1.0], scales: [1.0]}
  completion: {shares: [0.5]}
  embedding_search: {steps: 2, batch_size: 2, most_files: 1, images: 2}
  image_to_image: {strengths: [0.5]}
  membership: {draws: 2, repeats: 2}
  neighbours: {most: 2}
  quality: {blocks: 2, block_images: 4}
  relearning: {images: [4], weights: [full], steps: [1], batch_size: 2}
  reproduction: {most_files: 1, images: 2}
"""
JUDGE = "def answers(images, labels):\n    return [int(image.mean()) % (len(labels) + 1) - 1 for image in images]\n"
FEATURES = "def features(images):\n    return images[:, :, ::8, ::8].flatten(1).float()\n"
SAEMNESIA = {
    "block": "up_blocks.1.attentions.0",
    "images_per_prompt": 2,
    "held_out": 2,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "expansion": 2,
    "k": 4,
    "batch_size": 128,
    "intervention": "steer",
    "strength": -30.0,
    "epochs": 1,
}
SHADES = {"coat": 40, "bag": 120, "shoe": 200}


def folder_of_images(path: Path, count: int = 5, shift: int = 0) -> Path:
    for name, shade in SHADES.items():
        (path / name).mkdir(parents=True)
        for number in range(count):
            image = Image.new("RGB", (32, 32), (shade + 3 * number + shift, shade, 10 * number))
            image.save(path / name / f"{number}.png")
    lines = [
        json.dumps({"file_name": f"{name}/{number}.png", "text": f"a {name}"})
        for name in SHADES
        for number in range(count)
    ]
    (path / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def place(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (here / "audit_judge.py").write_text(JUDGE)
    (here / "audit_features.py").write_text(FEATURES)
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setenv("PYTHONPATH", str(here), prepend=":")
    folder_of_images(here / "data")
    folder_of_images(here / "unseen", shift=1)
    return here


def arguments(base: Path, *more: object) -> list[object]:
    judged = ["--judge", "audit_judge:answers", "--config", "nano.yaml"]
    return ["audit", base, "--base", base, "--data", "data", "--forget-class", "coat", *judged, *more]


def figures(folder: Path) -> dict[str, Any]:
    return {battery["battery"]: battery for battery in json.loads((folder / "audit.json").read_text())["batteries"]}


def test_an_audit_of_a_model_with_prompts_resumes_to_the_same_bytes(
    place: Path, nano_folder: Callable[[str], Path]
) -> None:
    base = nano_folder("sd")
    compared = ["--unseen", "unseen", "--reference", base, "--features", "audit_features:features"]
    every = arguments(base, *compared, "--out", "audit")
    succeed(*every)
    found = figures(place / "audit")
    refused = {name for name, battery in found.items() if battery["not_applicable"]}
    assert refused == {"found-words", "protocol"}
    for name, battery in found.items():
        if name not in refused:
            for figure in battery["figures"]:
                assert figure["model"] == figure["base"], f"the model is its own base in {name}"
                assert ("reference" in figure) == (name == "membership")
    page = (place / "audit" / "audit.html").read_text()
    assert all(battery["title"] in page for name, battery in found.items() if name not in refused)
    assert "no prompt file is given" in page
    assert "<img src" in page
    assert "FID" not in (place / "audit" / "audit.json").read_text()

    names = ("audit.jsonl", "audit.json", "audit.html")
    whole = {name: (place / "audit" / name).read_bytes() for name in names}
    lines = whole["audit.jsonl"].splitlines(keepends=True)
    (place / "audit" / "audit.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]) + lines[-1][:20])
    assert run_command(*every) == 2, "a folder that is not empty"
    succeed(*every, "--resume")
    assert (place / "audit" / "audit.jsonl").read_bytes() == whole["audit.jsonl"]
    assert (place / "audit" / "audit.json").read_bytes() == whole["audit.json"]
    assert run_command(*every, "--resume", "--seed", 5) == 2, "another audit"


def test_ctrl_c_loses_no_finished_piece(
    place: Path, nano_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    every = arguments(nano_folder("sd"), "--batteries", "prompts", "--out", "audit")
    measure, begun = BATTERIES["prompts"].measure, []

    def stopped(battery: Any, subject: Any, piece: Any) -> Any:
        begun.append(piece)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return measure(battery, subject, piece)

    monkeypatch.setattr(BATTERIES["prompts"], "measure", stopped)
    assert run_command(*every) == 130
    assert "Continue with the same command and --resume" in capsys.readouterr().err
    assert len((place / "audit" / "audit.jsonl").read_text().splitlines()) == 2
    succeed(*every, "--resume")
    assert len(begun) == 3 + 2


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "ddpm_class", "ddpm_unconditional", "dit", "ldm"])
def test_every_family_is_audited(place: Path, nano_folder: Callable[[str], Path], family: str) -> None:
    base = nano_folder(family)
    prompted = family in ("sdxl", "sd3", "flux")
    if not prompted:
        text = (place / "nano.yaml").read_text().replace("{height: 32, width: 32, bucket_step: 16}", "{}")
        (place / "nano.yaml").write_text(text)
    if family == "dit":
        names = ("bird", "cat", "deer")
        (place / "data" / "metadata.jsonl").unlink()
        for name, other in zip(SHADES, names, strict=True):
            (place / "data" / name).rename(place / "data" / other)
    batteries = "prompts,inversion,noise,reproduction,neighbours" + (
        ",quality" if family in ("sd3", "ddpm_class") else ""
    )
    forget = "bird" if family == "dit" else "coat"
    flags = ["--judge", "audit_judge:answers", "--config", "nano.yaml", "--batteries", batteries, "--out", "audit"]
    succeed("audit", base, "--base", base, "--data", "data", "--forget-class", forget, *flags)
    found = figures(place / "audit")
    reasons = {name: battery["not_applicable"] for name, battery in found.items() if battery["not_applicable"]}
    if prompted:
        assert not reasons
    else:
        assert reasons["inversion"] == "the model takes no prompts"
        assert ("neighbours" in reasons) == (family in ("ddpm_unconditional", "ldm"))
    assert found["prompts"]["measurements"]["model"] == found["prompts"]["measurements"]["base"] > 0


def test_the_folder_of_a_run_tells_what_was_asked(
    place: Path, nano_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text = (place / "nano.yaml").read_text()
    (place / "nano.yaml").write_text(text[: text.index("audit:")])
    succeed(
        "unlearn",
        "--model",
        nano_folder("sd"),
        "--data",
        "data",
        "--forget-class",
        "coat",
        "--config",
        "nano.yaml",
        "--out",
        "run",
    )
    judged = ["--judge", "audit_judge:answers", "--batteries", "prompts", "--set", "audit.images=2"]
    succeed("audit", "run", *judged, "--out", "audit")
    told = json.loads((place / "audit" / "audit.json").read_text())
    assert told["models"] == {"model": "run/model", "base": str(nano_folder("sd"))}
    assert told["forgotten"] == ["a coat"]
    assert told["retained"] == ["a bag", "a shoe"]
    capsys.readouterr()
    succeed("audit", "run", *judged, "--dry-run", "--json")
    assert json.loads(capsys.readouterr().out)["prompts"]["passes"] > 0


def test_a_lora_an_eraser_and_a_single_file_are_audited(place: Path, nano_folder: Callable[[str], Path]) -> None:
    base = nano_folder("sd")
    kept = low_rank(16, 16)
    save_file(
        {f"unet.{QUERY}.lora_A.weight": kept[0], f"unet.{QUERY}.lora_B.weight": kept[1]}, place / "lora.safetensors"
    )
    only = ["--batteries", "quality", "--features", "audit_features:features"]
    succeed(*arguments(base, "--lora", "lora.safetensors", *only, "--out", "lora"))
    agreement = figures(place / "lora")["quality"]["figures"][2]
    assert agreement["base"]["value"] == pytest.approx(1, abs=1e-5), "the LoRA is not the base's"
    assert agreement["model"]["value"] < 0.9999

    load_text_to_image(base).save(place / "one.safetensors", layout="single-file")
    single = ["audit", "one.safetensors", *arguments(base)[2:]]
    succeed(*single, "--set", f"text_to_image.config={base}", *only, "--out", "single")
    agreement = figures(place / "single")["quality"]["figures"][2]
    assert agreement["model"] == agreement["base"]

    settings = [word for name, value in SAEMNESIA.items() for word in ("--set", f"saemnesia.{name}={value}")]
    asked = ["--forget-prompts", "a cat", "--retain-prompts", "a dog;a sofa", "--config", "plain.yaml"]
    (place / "plain.yaml").write_text("threads: 1\n")
    succeed("unlearn", "--method", "saemnesia", "--model", base, "--out", "erased", *settings, *asked)
    short = [
        "--quick",
        "--set",
        "audit.images=2",
        "--set",
        "sample.num_inference_steps=2",
        "--set",
        "audit.templates=[]",
    ]
    judged = ["--judge", "audit_judge:answers", "--batteries", "prompts,relearning"]
    succeed("audit", "erased", *judged, *short, "--out", "eraser")
    found = figures(place / "eraser")
    assert found["prompts"]["measurements"]["model"] > 0
    assert found["relearning"]["not_applicable"].startswith("an eraser is attached")


def test_batteries_are_listed_with_their_settings(capsys: pytest.CaptureFixture[str]) -> None:
    succeed("info", "--batteries", "--json")
    listed = json.loads(capsys.readouterr().out)
    assert list(listed) == list(BATTERIES)
    assert listed["embedding-search"]["settings"]["audit.embedding_search.lr"] == 0.1
    succeed("info", "--batteries")


def test_processes_share_an_audit(place: Path, nano_folder: Callable[[str], Path]) -> None:
    common = arguments(nano_folder("sd"), "--batteries", "prompts,neighbours")
    succeed(*common, "--out", "alone")
    command = [sys.executable, "-m", "erasediff.cli", *map(str, common), "--out", "shared", "--launch", "ddp"]
    ended = subprocess.run([*command, "--processes", "2", "--device", "cpu"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert (place / "shared" / "audit.jsonl").read_bytes() == (place / "alone" / "audit.jsonl").read_bytes()


def test_a_share_that_is_too_high_ends_with_3(place: Path, nano_folder: Callable[[str], Path]) -> None:
    (place / "audit_judge.py").write_text("def answers(images, labels):\n    return [0] * len(images)\n")
    sys.modules.pop("audit_judge", None)
    common = arguments(nano_folder("sd"), "--batteries", "prompts")
    assert run_command(*common, "--out", "audit", "--fail-above", "0.5") == 3
    assert "at most 50.0% allowed" in (place / "audit" / "audit.html").read_text()
    assert json.loads((place / "audit" / "audit.json").read_text())["limit"] == 0.5
    assert run_command(*common, "--out", "again", "--fail-above", "1") == 0


def test_a_protocol_tells_what_it_was_measured_with(place: Path, nano_folder: Callable[[str], Path]) -> None:
    (place / "i2p.csv").write_text("prompt,sd_seed,sd_guidance_scale\na coat,5,3.0\na bag,6,1.5\n")
    flags = ["--batteries", "protocol", "--protocol", "i2p", "--prompts", "i2p.csv", "--out", "audit"]
    succeed(*arguments(nano_folder("sd"), *flags))
    told = figures(place / "audit")["protocol"]
    assert told["measurements"] == {"model": 2, "base": 2}
    facts = told["description"]
    assert len(facts["prompts_sha256"]) == 64
    assert {"detector", "detector_sha256", "sampler", "steps", "counted"} <= facts.keys()
    rows = [json.loads(line) for line in (place / "audit" / "audit.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows[0]["rows"]] == [5, 6]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--batteries", "tea"], 'There is no battery "tea"'),
        (["--judge", "tea"], 'There is no judge "tea"'),
        (["--word", "tea"], 'The word "tea" stands in no forgotten prompt'),
        (["--protocol", "i2p"], "needs its prompts"),
        (["--fail-above", "3"], "--fail-above is a share"),
        (
            ["--set", "audit.noise.eta=1"],
            'Unknown setting "audit.noise.eta" in nano.yaml; did you mean audit.noise.etas',
        ),
        (["--features", "nowhere"], "nowhere is no folder"),
        (["--resume"], "There is no audit in"),
        (["--unseen", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    place: Path,
    nano_folder: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    sentence: str,
) -> None:
    base = nano_folder("sd")
    assert run_command(*arguments(base, *flags, "--out", "audit")) == 2
    assert sentence in capsys.readouterr().err.replace("\n", " ")
    assert not (place / "audit").exists()
    assert run_command("audit", base, "--data", "data", "--out", "audit") == 2


def test_a_judge_is_asked_for_where_one_is_needed(
    place: Path, nano_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base = nano_folder("sd")
    flags = ["--forget-prompts", "a photo of a coat", "--config", "nano.yaml", "--batteries", "prompts"]
    assert run_command("audit", base, "--base", base, *flags, "--out", "audit") == 2
    assert "A judge has to say what images show" in capsys.readouterr().err
    files = place / "files.txt"
    files.write_text("coat/0.png\n")
    by_file = [
        "--data",
        "data",
        "--forget-files",
        files,
        "--config",
        "nano.yaml",
        "--batteries",
        "prompts,reproduction",
    ]
    succeed("audit", base, "--base", base, *by_file, "--out", "audit")
    assert figures(place / "audit")["prompts"]["not_applicable"].startswith("no prompts or classes are forgotten")

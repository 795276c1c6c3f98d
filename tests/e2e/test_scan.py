"""``erasediff scan``: ranked captions, a list for ``--forget-prompts``, continuation, mistakes."""

import json
from pathlib import Path
from typing import Any

import nano
import pytest
from helpers import run_command, succeed
from torch import Tensor

from erasediff.cli.options import prompts
from erasediff.models.stable_diffusion import StableDiffusion

CONTROL = "a dog;a bird;a tree;a red car;a house"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nano.save("sd", tmp_path_factory.mktemp("scan") / "model")


@pytest.fixture(autouse=True)
def _known_by_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant prompts that the network follows strongly: their embeddings are far from all others'."""
    encode = StableDiffusion.encode_prompts

    def planted(self: StableDiffusion, texts: list[str]) -> dict[str, Tensor]:
        text = encode(self, texts)["encoder_hidden_states"]
        for row, prompt in enumerate(texts):
            text[row] *= 40 if "known" in prompt else 1
        return {"encoder_hidden_states": text}

    monkeypatch.setattr(StableDiffusion, "encode_prompts", planted)


def arguments(model: Path, out: Path, *more: object) -> tuple[object, ...]:
    asked = "a cat;known one;a dog at sea;known too;a cat"
    return ("scan", model, "--prompts", asked, "--control", CONTROL, "--out", out, "--count", 2, "--json", *more)


def scanned(capsys: pytest.CaptureFixture[str], *given: object) -> dict[str, Any]:
    capsys.readouterr()
    succeed(*given)
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_planted_prompts_are_found_and_listed(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = scanned(capsys, *arguments(model, tmp_path / "out"))
    assert {row["prompt"] for row in result["ranked"][:2]} == {"known one", "known too"}
    assert all(row["flagged"] and row["z"] > 3 for row in result["ranked"][:2])
    assert result["prompts"] == 4
    assert result["control"]["count"] == 5
    listed = prompts(result["list"])
    assert listed is not None
    assert listed[:2] == [row["prompt"] for row in result["ranked"][:2]]
    lines = [json.loads(line) for line in Path(result["rows"]).read_text().splitlines()]
    assert lines[0]["num_inference_steps"] == 50
    assert [len(line["scores"]) for line in lines[1:]] == [2] * 9


def test_an_interrupted_scan_goes_on(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = scanned(capsys, *arguments(model, tmp_path / "found.txt"))
    rows = tmp_path / "found.jsonl"
    assert whole["rows"] == str(rows)
    content = rows.read_text()
    third = content.splitlines()[3]
    changed = json.loads(third) | {"score": 123.0}
    for torn in (30, len(content) - 20):
        rows.write_text(content[:torn].replace(third, json.dumps(changed)))
        (tmp_path / "found.txt").unlink()
        again = scanned(capsys, *arguments(model, tmp_path / "found.txt"))
        # What was measured is not measured again.
        assert (again["ranked"][0]["score"] == 123.0) == (torn > 30)
        assert rows.read_text().replace(json.dumps(changed), third) == content


def test_another_scan_is_not_continued(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    succeed(*arguments(model, out))
    before = (out / "scores.jsonl").read_bytes()
    assert run_command(*arguments(model, out, "--seed", 5)) == 2
    assert "the same seed" in " ".join(capsys.readouterr().err.split())
    other = nano.save("sd", tmp_path / "other", seed=1)
    assert run_command(*arguments(other, out)) == 2
    assert (out / "scores.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", ['{"mine": 1}', '{"mine": 1}\n', "text\n"])
def test_a_file_of_the_users_is_kept(
    content: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "notes.jsonl"
    mine.write_text(content)
    assert run_command(*arguments(model, tmp_path / "notes.txt")) == 2
    assert mine.read_text() == content
    (tmp_path / "list.txt").write_text("mine")
    assert run_command(*arguments(model, tmp_path / "list.txt")) == 2
    assert "exists already" in capsys.readouterr().err
    assert run_command(*arguments(model, tmp_path)) == 2
    assert "holds no scan" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--control", "a cat"), "at least two prompts"),
        (("--steps", 51), "more than the 50"),
        (("--prompts", "no.txt"), "Cannot read"),
        (("--prompts", ";"), "no prompt"),
        (("--set", "images.height=33"), "33"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    more: tuple[object, ...], told: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(*arguments(model, tmp_path / "out", *more)) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "told"), [("flux", "no unconditional prediction"), ("ddpm_class", "takes no prompts")]
)
def test_models_without_guidance_by_prompts_are_refused(
    name: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(*arguments(nano.save(name, tmp_path / "model"), tmp_path / "out")) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_the_table_is_shown_with_plain_captions_as_control(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    succeed("scan", model, "--prompts", "known one;[bold]", "--out", tmp_path / "out", "--count", 1)
    shown = " ".join(capsys.readouterr().out.split())
    assert "50 control captions" in shown
    assert "[bold]" in shown

"""Verification of runs: untouched ones pass, and every forgery is told by the name of what was forged."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nano
import pytest
from forgeries import Forgery, Place, forgeries, seal
from helpers import run_command, succeed
from PIL import Image

from erasediff.errors import UserError
from erasediff.provenance.receipt import write_receipt
from erasediff.provenance.ssh_signature import SshKey
from erasediff.provenance.verification import Verification, verify_run
from erasediff.verdict.statistics import Estimate, mean, share

SETTINGS = """
threads: 1
images: {height: 32, width: 32, bucket_step: 16}
unlearn: {steps: 2, batch_size: 2, lr: 1.0e-3}
run: {log_every: 1, look_every: 0}
"""
FORGERIES = list(forgeries())

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a verdict, what it read, another run, and a receipt of a run before it beside its model."""
    folder = tmp_path_factory.mktemp("runs")
    for number, name in enumerate(("cat/0.png", "cat/1.png", "dog/2.png", "dog/3.png", "dog/4.png")):
        path = folder / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize((32, 32)).rotate(10 * number).convert("RGB").save(path)
        path.with_suffix(".txt").write_text(f"a {path.parent.name}")
    nano.save("sd", folder / "base")
    nano.save("sd", folder / "base2", seed=1)
    (folder / "receipt.json").write_text(json.dumps({"seed": 0, "files": {}}))
    (folder / "settings.yaml").write_text(SETTINGS)
    for out, seed in (("run", 0), ("other", 1)):
        flags = ("--config", folder / "settings.yaml", "--seed", seed, "--forget-class", "cat", "--out", folder / out)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
            succeed("unlearn", "--model", folder / "base", "--data", folder / "photos", *flags)
    _give_verdict(folder / "run")
    record = json.loads((folder / "run/receipt.json").read_bytes())["input"]["model"]["files"]
    (folder / "receipt.json").write_text(
        json.dumps({"seed": 0, "files": {f"base/{name}": described for name, described in record.items()}})
    )
    write_receipt(folder / "run", "unlearn")
    return folder


def _give_verdict(run: Path) -> None:
    """A verdict whose judge saw all of eight cats before and none after, and six of as many dogs both times."""
    lines, hits = [], {"cat": {"before": 8, "after": 0}, "dog": {"before": 6, "after": 6}}
    for label, by_model in hits.items():
        for model, count in by_model.items():
            for image in range(8):
                sees = label if image < count else "boat"
                line = {"judge": "original", "model": model, "asked": label, "image": image, "sees": sees}
                lines.append(line)
    (run / "verdict.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    def figure(key: str, after: Estimate, before: Estimate | None = None, limit: float | None = None) -> dict[str, Any]:
        return {
            "key": key,
            "judge": "original",
            "before": before and before.to_dict(),
            "after": after.to_dict(),
            "relation": None if limit is None else "at most",
            "limit": limit,
            "compared": "low" if key == "worst_drop" else "value",
            "is_met": None if limit is None else True,
            "decides": limit is not None,
        }

    figures = [
        figure("recognised", share(0, 8), share(8, 8), limit=0.03),
        figure("retained_drop", mean([0.0] * 8), limit=0.05),
        figure("worst_drop", mean([0.0] * 8), limit=0.1),
        figure("retained", share(6, 8), share(6, 8)),
    ]
    verdict = {"verdict": "forgotten, the rest retained", "forgotten": "forgotten", "retained": "retained"}
    verdict |= {"sought": ["cat"], "figures": figures, "model": "model"}
    (run / "verdict.json").write_text(json.dumps(verdict))


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Place:
    """A copy of all of it that may be forged."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint-*", "cache"))
    return Place(tmp_path)


def verified(place: Place) -> Verification:
    return verify_run(place.run, data=place.photos)


def test_an_untouched_run_passes_wherever_it_lies(place: Place) -> None:
    result = verified(place)
    assert result.faults == []
    assert result.notes == []
    assert result.tensors > 600
    assert result.files > 20


@pytest.mark.parametrize(
    "forgery", [pytest.param(forgery, id=f"{forgery.kind}-{number}") for number, forgery in enumerate(FORGERIES)]
)
def test_a_forgery_is_told_by_name(forgery: Forgery, place: Place) -> None:
    forgery.forge(place)
    told = [str(fault) for fault in verified(place).faults]
    assert any(fault.startswith(forgery.named) for fault in told), told[:10]


def test_there_are_a_hundred_forgeries_of_more_than_ten_kinds() -> None:
    kinds = Counter(forgery.kind for forgery in FORGERIES)
    assert kinds.total() >= 100
    assert len(kinds) >= 10


def test_what_a_run_may_hold_besides_is_a_note(place: Place) -> None:
    for name in ("audit.jsonl", "images/0.png", "checkpoint-2/state.safetensors", "crash.log"):
        (place.run / name).parent.mkdir(exist_ok=True)
        (place.run / name).write_text("x")
    result = verified(place)
    assert result.faults == []
    assert result.notes == ["Not covered by the receipt: audit.jsonl, images/0.png."]


def test_a_model_is_known_by_the_name_that_its_verdict_gave_it(place: Place) -> None:
    (place.run / "model").rename(place.run / "model-damaged")
    content = (place.run / "verdict.json").read_text()
    (place.run / "verdict.json").write_text(content.replace('"model": "model"', '"model": "model-damaged"'))
    write_receipt(place.run, "unlearn")
    result = verified(place)
    assert result.faults == []
    (place.run / "model-damaged/more.txt").write_text("x")
    assert [fault.what for fault in verified(place).faults] == ["model-damaged/more.txt"]


def test_only_a_receipt_and_what_it_names_can_be_verified(place: Place) -> None:
    with pytest.raises(UserError, match=r"There is no receipt\.json"):
        verify_run(place.photos)
    shutil.rmtree(place.base)
    with pytest.raises(UserError, match="name it with --base"):
        verify_run(place.run)
    (place.run / "receipt.json").write_text("{")
    with pytest.raises(UserError, match="is no receipt"):
        verify_run(place.run)


def test_exit_codes_and_lines_of_the_command(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("verify", place.run) == 0
    shutil.rmtree(place.folder / "base")
    assert run_command("verify", place.run, "--base", place.base2) == 3
    printed = capsys.readouterr()
    assert "input/unet/config.json" not in printed.out
    assert "input/unet/diffusion_pytorch_model.safetensors, tensor conv_in.weight: expected" in printed.out
    assert "not what its receipt says" in printed.err
    assert run_command("verify", place.run) == 2


@pytest.fixture
def keys(tmp_path: Path) -> Callable[[str], Path]:
    """``keys(name)``: a new SSH key; the file ``signers`` allows the one that is called "mine"."""
    if shutil.which("ssh-keygen") is None:
        pytest.skip("there is no ssh-keygen")

    def make(name: str) -> Path:
        path = tmp_path / name
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", path], check=True)
        if name == "mine":
            public = path.with_suffix(".pub").read_text()
            (tmp_path / "signers").write_text(f'me@example.org namespaces="erasediff" {public}')
        return path

    return make


def test_a_signature_is_one_of_an_allowed_key(place: Place, keys: Callable[[str], Path]) -> None:
    mine, other = SshKey(keys("mine")), SshKey(keys("theirs"))

    def told() -> list[str]:
        return [str(fault) for fault in verify_run(place.run, signers=place.signers).faults]

    assert told() == ["receipt.json.sig: expected a signature, found no such file"]
    write_receipt(place.run, "unlearn", mine)
    assert told() == []
    assert any("whose key" in note for note in verify_run(place.run).notes)
    seal(place.run, lambda receipt: receipt["versions"].update(torch="9.9"))
    assert any(fault.startswith("receipt.json.sig: expected a signature of receipt.json") for fault in told())
    assert any(fault.what == "receipt.json.sig" for fault in verify_run(place.run).faults)
    write_receipt(place.run, "unlearn", other)
    assert told() == ["receipt.json.sig: expected a signature of receipt.json, found a key that signers does not name"]
    (place.run / "receipt.json.sig").write_text("nonsense")
    assert any(fault.startswith("receipt.json.sig") for fault in told())


def test_a_key_that_cannot_sign_is_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("no key")
    for name, message in (("gpg:key", "names no key"), ("ssh:missing", "no SSH key"), (f"ssh:{tmp_path}/key", "sign")):
        with pytest.raises(UserError, match=message):
            SshKey.named(name)

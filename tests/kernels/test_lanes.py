"""When `tools/lanes.py` runs a lane, and when it may say that one passed."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.delenv("CI_FULL", raising=False)
    spec = importlib.util.spec_from_file_location("lanes", ROOT / "tools/lanes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "lanes", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(lanes: ModuleType, tmp_path: Path) -> Path:
    """The sources that lanes depend on, as a clone has them."""
    for name in lanes.SOURCES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, tmp_path / name)
        else:
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def noting(lanes: ModuleType, code: str = "") -> object:
    """A lane that leaves a line in `ran`, then does what `code` says."""
    return lanes.Lane(
        command=(sys.executable, "-c", f"open('ran', 'a').write('once\\n'); {code}"),
        runs_pytest=False,
    )


def times_run(checkout: Path) -> int:
    return (checkout / "ran").read_text().count("once")


def test_a_lane_is_left_out_until_an_input_changes(
    lanes: ModuleType, checkout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = noting(lanes)
    assert lanes.run("it", lane, checkout)
    assert times_run(checkout) == 1
    assert "lane it: runs, no run of it that passed is recorded" in capsys.readouterr().out

    assert lanes.run("it", lane, checkout)
    assert times_run(checkout) == 1
    assert capsys.readouterr().out == (
        "lane it: left out, it passed with these inputs before (.ci/green/it.json); CI_FULL=1 runs it\n"
    )

    source = checkout / "csrc/cuda/gradient_gram.cu"
    content = source.read_bytes()
    source.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert lanes.run("it", lane, checkout)
    assert times_run(checkout) == 2
    assert "lane it: runs, csrc changed since it last passed" in capsys.readouterr().out

    monkeypatch.setenv("CI_FULL", "1")
    assert lanes.run("it", lane, checkout)
    assert times_run(checkout) == 3
    monkeypatch.delenv("CI_FULL")
    monkeypatch.setattr(lanes, "package_version", lambda name: "0.0")
    assert lanes.run("it", lane, checkout)
    assert times_run(checkout) == 4


@pytest.mark.parametrize("name", ["emulator", "interpreter", "aot"])
def test_every_source_file_and_version_counts(lanes: ModuleType, checkout: Path, name: str) -> None:
    before = lanes.digests(lanes.LANES[name], checkout)
    assert {"csrc", "kernels", "tests/kernels", "tools", "setup.py", "python", "torch"} <= set(before)
    for path in ("csrc/names.h", "kernels/erasediff_kernels/optim.py", "tests/kernels/emulator/cuda_runtime.h"):
        (checkout / path).write_text((checkout / path).read_text() + " ")
    (checkout / "tools/new.py").touch()
    after = lanes.digests(lanes.LANES[name], checkout)
    assert {key for key in before if before[key] != after[key]} == {"csrc", "kernels", "tests/kernels", "tools"}


def test_a_lane_that_fails_is_not_recorded(lanes: ModuleType, checkout: Path) -> None:
    for _ in range(2):
        assert not lanes.run("it", noting(lanes, "raise SystemExit(1)"), checkout)
    assert times_run(checkout) == 2
    assert not (checkout / ".ci").exists()


def test_a_lane_is_not_recorded_for_inputs_that_it_did_not_run_with(lanes: ModuleType, checkout: Path) -> None:
    assert lanes.run("it", noting(lanes, "open('csrc/names.h', 'a').write(' ')"), checkout)
    assert not (checkout / ".ci").exists()


@pytest.mark.parametrize("body", ["import pytest; pytest.skip('no compiler')", "assert False", None])
def test_tests_that_did_not_run_prove_nothing(lanes: ModuleType, checkout: Path, body: str | None) -> None:
    (checkout / "test_it.py").write_text(f"def test_it():\n    {body}\n" if body else "")
    assert not lanes.run("it", lanes.Lane(command=(*lanes.PYTEST, "test_it.py")), checkout)
    assert not (checkout / ".ci").exists()


def test_a_damaged_record_is_none(lanes: ModuleType, checkout: Path) -> None:
    lane = noting(lanes)
    assert lanes.run("it", lane, checkout)
    record = checkout / ".ci/green/it.json"
    assert json.loads(record.read_text()) == lanes.digests(lane, checkout)
    record.write_text(record.read_text()[:-10])
    assert lanes.run("it", lane, checkout)
    assert times_run(checkout) == 2


def test_what_the_makefile_leaves_to_lanes_is_in_one(lanes: ModuleType) -> None:
    left = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("LANE_TESTS :="))
    in_lanes = {argument for lane in lanes.LANES.values() for argument in lane.command if argument.endswith(".py")}
    assert set(left.split()[2:]) == in_lanes
    assert all((ROOT / file).is_file() for file in in_lanes)

"""Run the test lanes that are slow and whose inputs changed since they last passed.

`python tools/lanes.py emulator interpreter aot`; `make test` does so. A lane is left out only if `.ci/green/` holds the
digests of its inputs as they are now: files, and the versions of compilers and libraries. Those records are committed,
so that they are there in a fresh clone. Nothing but this program writes one, after it ran the lane and the lane passed
with no test skipped. CI_FULL=1 runs every lane.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
RECORDS = Path(".ci/green")
SOURCES = ("csrc", "kernels", "tests/kernels", "tools", "tests/conftest.py", "setup.py")
NOT_SOURCES = ("__pycache__", ".so", ".pyc")
PYTEST = (sys.executable, "-m", "pytest", "-rP", "--durations=40")


@dataclass(frozen=True, kw_only=True, slots=True)
class Lane:
    """A command, and the packages and compilers whose versions it depends on besides ``SOURCES``.

    Args:
        runs_pytest: The command is pytest's: a lane with a skipped test has not passed.
    """

    command: tuple[str, ...]
    packages: tuple[str, ...] = ("torch",)
    compilers: tuple[str, ...] = ()
    runs_pytest: bool = True


LANES = {
    "emulator": Lane(command=(*PYTEST, "tests/kernels/test_compiled_cuda.py"), compilers=("c++",)),
    "interpreter": Lane(command=(*PYTEST, "tests/kernels/test_triton_interpreted.py"), packages=("torch", "triton")),
    "aot": Lane(
        command=("make", "--no-print-directory", "kernels-aot", f"VENV={sys.prefix}"),
        packages=("torch", "triton"),
        compilers=("c++", "nvcc"),
        runs_pytest=False,
    ),
}


def digests(lane: Lane, root: Path) -> dict[str, str]:
    """Everything that a lane's outcome depends on, by name."""
    found = {name: digest(root / name) for name in SOURCES}
    found["python"] = f"{sys.version_info.major}.{sys.version_info.minor} {sys.platform} {platform.machine()}"
    return (
        found
        | {name: package_version(name) for name in lane.packages}
        | {name: compiler_version(name) for name in lane.compilers}
    )


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's file names and contents."""
    total = hashlib.sha256()
    for file in sorted(source_files(path)):
        content = file.read_bytes()
        total.update(f"{file.relative_to(path).as_posix()} {len(content)}\n".encode() + content)
    return total.hexdigest()


def source_files(path: Path) -> Iterator[Path]:
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not any(part.endswith(NOT_SOURCES) for part in file.relative_to(path.parent).parts):
            yield file


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def compiler_version(name: str) -> str:
    """Version of the compiler that the lane would call, in its own words."""
    found = shutil.which(os.environ.get("CXX", name) if name == "c++" else name)
    if found is None:
        return "missing"
    return subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout.strip()


def reason_to_run(name: str, now: dict[str, str], root: Path) -> str | None:
    """Why a lane has to run, or None if it passed with these very inputs."""
    if os.environ.get("CI_FULL") == "1":
        return "CI_FULL=1"
    try:
        green = json.loads((root / RECORDS / f"{name}.json").read_text())
    except (FileNotFoundError, ValueError):
        return "no run of it that passed is recorded"
    changed = [key for key in now | green if now.get(key) != green.get(key)]
    return f"{', '.join(changed)} changed since it last passed" if changed else None


def passes(name: str, lane: Lane, root: Path) -> bool:
    """Run the lane's command. Where it is pytest's, a skipped test proves nothing, and the lane has not passed."""
    command, report = list(lane.command), root / "build" / "lanes" / f"{name}.xml"
    report.unlink(missing_ok=True)
    if lane.runs_pytest:
        command.append(f"--junitxml={report}")
    if subprocess.run(command, cwd=root, check=False).returncode:
        print(f"lane {name}: failed", flush=True)
        return False
    if lane.runs_pytest:
        suites = list(ElementTree.parse(report).iter("testsuite"))
        tests, skipped = (sum(int(suite.attrib[count]) for suite in suites) for count in ("tests", "skipped"))
        if skipped or not tests:
            print(f"lane {name}: failed, since {skipped} of its {tests} tests were skipped", flush=True)
            return False
    return True


def run(name: str, lane: Lane, root: Path = ROOT) -> bool:
    """Run a lane that has to run, and record it if it passed. Returns False if it failed."""
    inputs = digests(lane, root)
    reason = reason_to_run(name, inputs, root)
    record = RECORDS / f"{name}.json"
    if reason is None:
        print(f"lane {name}: left out, it passed with these inputs before ({record}); CI_FULL=1 runs it", flush=True)
        return True
    print(f"lane {name}: runs, {reason}", flush=True)
    if not passes(name, lane, root):
        return False
    if digests(lane, root) != inputs:
        print(f"lane {name}: passed, and is not recorded, since its inputs changed while it ran", flush=True)
        return True
    (root / RECORDS).mkdir(parents=True, exist_ok=True)
    partial = root / RECORDS / f".{name}.json"
    partial.write_text(json.dumps(inputs, indent=2) + "\n")
    partial.replace(root / record)
    print(f"lane {name}: passed; commit {record}", flush=True)
    return True


if __name__ == "__main__":
    if unknown := set(sys.argv[1:]) - set(LANES):
        sys.exit(f"no lane {', '.join(sorted(unknown))}: choose from {', '.join(LANES)}")
    passed = [run(name, LANES[name]) for name in sys.argv[1:] or LANES]
    sys.exit(not all(passed))

"""All kernel benchmarks: operators, then the step. Results are appended to benchmarks/results/kernels.jsonl.

`python benchmarks/kernels/run.py`; arguments go to `step.py`.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from record import append, environment

FOLDER = Path(__file__).resolve().parent
FILES = ("test_operators.py", "test_sparse.py")


def operators() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--no-header",
            "--import-mode=importlib",
            "-p",
            "no:cacheprovider",
        ]
        command += [*(str(FOLDER / file) for file in FILES), f"--benchmark-json={report}", "--benchmark-disable-gc"]
        command += ["--benchmark-columns=median,rounds", "--benchmark-sort=name"]
        # Its files know each other by name.
        paths = os.pathsep.join(path for path in (str(FOLDER), os.environ.get("PYTHONPATH")) if path)
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": paths})
        benchmarks = json.loads(report.read_text())["benchmarks"]
    lines = []
    for benchmark in benchmarks:
        stats, extra = benchmark["stats"], benchmark["extra_info"]
        lines.append(
            environment(extra["device"])
            | {
                "benchmark": "operator",
                "operator": benchmark["name"].partition("[")[0].removeprefix("test_"),
                **benchmark["params"],
                **{name: value for name, value in extra.items() if name != "device"},
                "seconds": stats["median"],
                "best_seconds": stats["min"],
                "rounds": stats["rounds"],
            }
        )
    append("kernels", lines)
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    rows = [f"{'operator':20} {'backend':20} {'dtype':9} {'ms':>9} {'best':>9} {'GB/s':>7}"]
    for line in lines:
        rate = line["moved_bytes"] / line["best_seconds"] / 1e9
        rows.append(
            f"{line['operator']:20} {line['backend']:20} {line['dtype']:9} {line['seconds'] * 1e3:9.2f} "
            f"{line['best_seconds'] * 1e3:9.2f} {rate:7.1f}"
        )
    return "\n".join(rows)


def main() -> None:
    print(f"{environment('cuda' if torch.cuda.is_available() else 'cpu')}", flush=True)
    lines = operators()
    subprocess.run([sys.executable, str(FOLDER / "step.py"), *sys.argv[1:]], check=True)
    print(table(lines))


if __name__ == "__main__":
    main()

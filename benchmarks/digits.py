"""Unlearn every digit, one run each, and keep the numbers: ``python benchmarks/digits.py [--unconditional]``.

One JSON line per digit goes to ``results/digits.jsonl`` (or ``digits-unconditional.jsonl``), with the commit, the
versions and the device; a Markdown table beside it is drawn from that file alone. ``--table`` redraws the table.
"""

import json
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("base", "erasediff", "finetune", "neggrad", "retrained")


def main(
    unconditional: Annotated[bool, typer.Option(help="A model without class labels.")] = False,
    digits: Annotated[str, typer.Option(help="Which digits.")] = "0,1,2,3,4,5,6,7,8,9",
    runs: Annotated[Path, typer.Option(help="Where the run folders go.")] = Path("runs/digits"),
    table: Annotated[bool, typer.Option("--table", help="Only redraw the table.")] = False,
) -> None:
    name = "digits-unconditional" if unconditional else "digits"
    results = RESULTS / f"{name}.jsonl"
    for digit in () if table else digits.split(","):
        line = run(int(digit), unconditional, runs)
        others = [other for other in read(results) if other["digit"] != line["digit"]]
        lines = sorted([*others, line], key=lambda line: line["digit"])
        results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = read(results)
    markdown = unconditional_table(lines) if unconditional else conditional_table(lines)
    results.with_suffix(".md").write_text(markdown)
    print(markdown)


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def run(digit: int, unconditional: bool, runs: Path) -> dict[str, Any]:
    """One demo through the command line, as a user would run it."""
    out = runs / f"{'unconditional-' if unconditional else ''}{digit}"
    command = ["erasediff", "demo", "--forget", str(digit), "--out", str(out), "--json"]
    begun = time.perf_counter()
    finished = subprocess.run(
        [*command, "--unconditional"] if unconditional else command, check=True, stdout=subprocess.PIPE, text=True
    )
    evaluation = json.loads(finished.stdout)
    return {
        "digit": digit,
        "seconds": round(time.perf_counter() - begun, 1),
        "commit": git("rev-parse", "--short", "HEAD"),
        "modified": bool(git("status", "--porcelain", "--untracked-files=no")),
        "versions": {library: version(library) for library in ("erasediff", "torch", "diffusers")},
        "device": platform.processor() or platform.machine(),
        "judge": evaluation["judge"],
        **{column: evaluation[column] for column in COLUMNS},
    }


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def conditional_table(lines: list[dict[str, Any]]) -> str:
    rows = [
        "| digit | forgotten: base | **EraseDiff** | fine-tuned | neg. gradient | retrained "
        "| others: base | **EraseDiff** | worst drop | fine-tuned | neg. gradient | retrained "
        "| discrepancy: base | **EraseDiff** | neg. gradient | retrained |",
        "|" + "---:|" * 16,
    ]
    for line in lines:
        drop = max(
            before - after
            for c, (before, after) in enumerate(
                zip(line["base"]["recognised"], line["erasediff"]["recognised"], strict=True)
            )
            if c != line["digit"]
        )
        forgotten = [percent(line[column]["forgotten_rate"]) for column in COLUMNS]
        retained = [percent(line[column]["retained_mean"]) for column in COLUMNS]
        retained.insert(2, f"{100 * drop:+.1f}")
        quality = [f"{line[column]['discrepancy']:.4f}" for column in ("base", "erasediff", "neggrad", "retrained")]
        rows.append(f"| {' | '.join([str(line['digit']), *forgotten, *retained, *quality])} |")
    return preamble(lines, "images asked for") + "\n".join(rows) + "\n"


def unconditional_table(lines: list[dict[str, Any]]) -> str:
    rows = [
        "| digit | share: base | **EraseDiff** | remaining | fine-tuned | neg. gradient | retrained "
        "| largest shift of another digit's proportion: **EraseDiff** | retrained "
        "| discrepancy: base | **EraseDiff** | neg. gradient | retrained |",
        "|" + "---:|" * 13,
    ]
    for line in lines:
        share = [percent(line[column]["forgotten_share"]) for column in COLUMNS]
        share.insert(2, percent(line["erasediff"]["forgotten_share"] / line["base"]["forgotten_share"]))
        # The base's proportions among the other digits.
        others = [0.0 if c == line["digit"] else s for c, s in enumerate(line["base"]["shares"])]
        base = [s / sum(others) for s in others]
        shift = [
            percent(max(abs(a - b) for a, b in zip(line[column]["proportions"], base, strict=True)))
            for column in ("erasediff", "retrained")
        ]
        quality = [f"{line[column]['discrepancy']:.4f}" for column in ("base", "erasediff", "neggrad", "retrained")]
        rows.append(f"| {' | '.join([str(line['digit']), *share, *shift, *quality])} |")
    return preamble(lines, "unconditional images") + "\n".join(rows) + "\n"


def preamble(lines: list[dict[str, Any]], images: str) -> str:
    judge = lines[0]["judge"]
    commits = ", ".join(sorted({line["commit"] for line in lines}))
    return (
        f"Shares of {images} in which the judge sees the digit, in percent; one unlearning run per row, each model "
        f"sampled with the same seeds. The judge never saw a generated image and is right on "
        f"{percent(judge['accuracy'])}% of the held-out real ones. Discrepancy: of the other digits' images from the "
        f"real ones, 0 is best.\n\nCommit {commits}, torch {lines[0]['versions']['torch']}.\n\n"
    )


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


if __name__ == "__main__":
    typer.run(main)

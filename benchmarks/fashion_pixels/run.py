"""Unlearn garments from pixel models of Fashion-MNIST, and keep what a classifier sees.

``python benchmarks/fashion_pixels/run.py class-conditional coat --seeds 0,1`` unlearns by the defaults, ``--set
unlearn.lr=1e-4`` by others; one JSON line per garment and seed goes to ``results/fashion_pixels.jsonl``. ``--table``
prints the table of all of them. The models are those of ``train.py``, made now if they are not there.
"""

from __future__ import annotations

import shutil
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from seen import Samples, Seen
from train import CACHE, KINDS, TRAINED, convert, write_data

from erasediff.config import Config, load_config, parse_assignments
from erasediff.errors import UserError
from erasediff.evaluation.sampling import sample_images
from erasediff.models import PixelModel
from erasediff.training.run_dir import RunPlace
from erasediff.workflows.build_unlearning import build_unlearning_job

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "nano_sd"))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "kernels"))
from fashion import CLASSES, DEBIAN_FOLDER
from record import RESULTS, append, environment, read

CHOSEN_ON = CLASSES[:5]
"""Garments that defaults are chosen on, with seed 0; they are reported on the others, with seed 1."""
NAME = "fashion_pixels"
READ = ("steps", "batch_size", "lr", "target", "relabel_to", "target_space", "retain_target", "eta", "ema_decay")


def main(
    kind: Annotated[str, typer.Argument(help=" or ".join(KINDS))] = KINDS[0],
    garments: Annotated[str, typer.Argument(help="With commas between them; one run each.")] = ",".join(CLASSES[5:]),
    seeds: Annotated[str, typer.Option(help="Of the run and of the samples.")] = "1",
    settings: Annotated[list[str] | None, typer.Option("--set", help="As in erasediff unlearn.")] = None,
    count: Annotated[int, typer.Option(help="Samples of each garment; ten times as many without classes.")] = 100,
    models: Annotated[Path, typer.Option(help="Where train.py keeps the models.")] = CACHE,
    data: Annotated[Path, typer.Option(help="Folder with Fashion-MNIST's four .gz files.")] = DEBIAN_FOLDER,
    keep: Annotated[Path | None, typer.Option(help="Keep the run folders here.")] = None,
    table: Annotated[bool, typer.Option("--table", help="Only print the table.")] = False,
) -> None:
    torch.set_num_threads(1)
    console = Console(stderr=True)
    try:
        if not table:
            prepare(kind, models, data)
            seen = Seen.of(data)
            for seed in map(int, seeds.split(",")):
                for garment in garments.split(","):
                    line = measure(kind, garment, seed, settings or [], count, models, seen, keep, console)
                    append(NAME, [line])
                    print(row(line), flush=True)
    except UserError as error:
        console.print(str(error), style="red", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    if table:
        print("\n".join([HEADER, *map(row, read(RESULTS / f"{NAME}.jsonl"))]))


def prepare(kind: str, models: Path, data: Path) -> None:
    """Put data and model into ``models``. UserError for a kind that there is not, and without the published data."""
    if kind not in KINDS:
        raise UserError(f"There is no kind {kind}: choose {' or '.join(KINDS)}.")
    write_data(data, models / "fashion.npz")
    if not (models / kind).exists():
        convert(TRAINED / kind, models / kind, torch.float32)


def measure(
    kind: str,
    garment: str,
    seed: int,
    settings: list[str],
    count: int,
    models: Path,
    seen: Seen,
    keep: Path | None,
    console: Console,
) -> dict[str, Any]:
    """One run, as ``erasediff unlearn --forget-class GARMENT`` makes it, and what is seen before and after."""
    if garment not in CLASSES:
        raise UserError(f"There is no garment {garment}: choose one of {', '.join(CLASSES)}.")
    given = parse_assignments(settings)
    places = {"images.data": str(models / "fashion.npz"), "unlearn.model": models / kind, "unlearn.forget": (garment,)}
    config = load_config(None, {"seed": seed, "threads": 1, **places, **given})
    before = draw_before(models / kind, count, seed)
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        job = build_unlearning_job(config, console=console)
        result = job.run(RunPlace(out), console)
        after = draw(result.model, count, seed)
        if keep is not None:
            shutil.copytree(out, keep / f"{kind}-{garment.replace(' ', '-')}-{seed}", dirs_exist_ok=True)
    return {
        "kind": kind,
        "forgotten": garment,
        "seed": seed,
        "given": given,
        "settings": resolved_settings(job.config),
        "seconds": round(result.seconds, 1),
        "relative_update": result.relative_update,
        "judge_accuracy": seen.judge.accuracy,
        "before": seen.describe(before, CLASSES.index(garment)),
        "after": seen.describe(after, CLASSES.index(garment)),
        **environment("cpu"),
    }


def resolved_settings(config: Config) -> dict[str, Any]:
    return {name: value for name, value in config.unlearn.model_dump(mode="json").items() if name in READ}


def draw(path: Path, count: int, seed: int) -> Samples:
    """``count`` samples of each garment, or ten times as many of a model without classes."""
    model = PixelModel.load(path)
    labels = None if model.num_classes is None else torch.arange(len(CLASSES)).repeat_interleave(count)
    return Samples(sample_images(model, labels, count * len(CLASSES), seed=seed), labels)


draw_before = cache(draw)


HEADER = """\
| model | forgotten | seed | settings | forgotten, % | others, % | worst, points | of nothing, % | Fréchet | steps |
|---|---|---:|---|---:|---:|---:|---:|---:|---:|"""


def row(line: dict[str, Any]) -> str:
    """A line of the table."""
    before, after = line["before"], line["after"]
    percent = {key: f"{100 * before[key]:.1f} to {100 * after[key]:.1f}" for key in ("forgotten", "others", "nothing")}
    cells = (
        line["kind"],
        line["forgotten"],
        str(line["seed"]),
        " ".join(f"{name}={value}" for name, value in line["given"].items()) or "defaults",
        percent["forgotten"],
        percent["others"],
        f"{100 * worst_change(line):.1f}",
        percent["nothing"],
        f"{before['frechet']:.1f} to {after['frechet']:.1f}",
        f"{line['settings']['steps']}, {line['seconds']:.0f} s",
    )
    return f"| {' | '.join(cells)} |"


def worst_change(line: dict[str, Any]) -> float:
    """Largest drop of another garment's share, or without classes the largest shift of its proportion of the others."""
    before, after = (
        {name: share for name, share in line[when]["shares"].items() if name != line["forgotten"]}
        for when in ("before", "after")
    )
    if line["kind"] == "class-conditional":
        return max(before[name] - after[name] for name in before)
    totals = sum(before.values()), sum(after.values())
    return max(abs(before[name] / totals[0] - after[name] / totals[1]) for name in before)


if __name__ == "__main__":
    typer.run(main)

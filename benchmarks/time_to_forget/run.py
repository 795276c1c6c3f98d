"""Seconds until a class is forgotten, against the public EraseDiff loop: ``python benchmarks/time_to_forget/run.py``.

Both start from the nano Stable Diffusion (``benchmarks/nano_sd``), see the same batches, and take turns in one process.
Every ``--every`` kept updates the judge looks at the same fixed samples of each; a contender is done once the
forgotten class is recognised in at most 3% of what is asked for it, and the others on average within 3 points of the
model before.
Seconds count training alone. Appends to results/time_to_forget.jsonl.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from contenders import Contender, Task, erasediff, published
from published import Published
from rich.console import Console

from erasediff.errors import UserError
from erasediff.models.family import TextToImageModel
from erasediff.models.load import load_text_to_image

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "nano_sd"))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "kernels"))
from fashion import CLASSES, PHRASES, prompt
from judge import Judge
from measure import CACHE, GUIDANCE_SCALE, INFERENCE_STEPS
from pixels import as_grey
from record import append, environment

FORGOTTEN_LIMIT = 0.03
RETAINED_DROP = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Shares recognised in the fixed samples: of the forgotten class, and the mean over the others."""

    forgotten: float
    retained: float

    def satisfies(self, base: Look) -> bool:
        return self.forgotten <= FORGOTTEN_LIMIT and self.retained >= base.retained - RETAINED_DROP


def look(model: TextToImageModel, judge: Judge, forgotten: int, asked: int, others: int, seed: int) -> Look:
    """``asked`` samples of the forgotten class and ``others`` of each other one."""
    labels = torch.arange(len(CLASSES)).repeat_interleave(
        torch.tensor([asked if label == forgotten else others for label in range(len(CLASSES))])
    )
    drawn = model.sample(
        [prompt(label) for label in labels.tolist()],
        guidance_scale=GUIDANCE_SCALE,
        num_inference_steps=INFERENCE_STEPS,
        seed=seed,
        batch_size=100,
    )
    answers, _ = judge.answer(as_grey(drawn))
    shares = [(answers[labels == label] == label).double().mean().item() for label in range(len(CLASSES))]
    return Look(forgotten=shares.pop(forgotten), retained=sum(shares) / len(shares))


def line(contender: Contender, seen: Look, base: Look, **more: Any) -> dict[str, Any]:
    return {
        "benchmark": "time to forget",
        "contender": contender.name,
        **contender.settings,
        "steps": contender.steps,
        "seconds": round(contender.seconds, 3),
        "cpu_seconds": round(contender.cpu_seconds, 3),
        "forgotten": seen.forgotten,
        "retained": round(seen.retained, 4),
        "retained_before": round(base.retained, 4),
        **more,
    }


def main(
    forgotten: Annotated[str, typer.Option(help="The class to forget.")] = "sneaker",
    anchor: Annotated[str, typer.Option(help="The class drawn in its place.")] = "ankle boot",
    batch_size: Annotated[int, typer.Option(help="Retained, and forgotten, images per step; 16 as published.")] = 16,
    lr: Annotated[float, typer.Option(help="Of EraseDiff, and of the public loop unless --published-lr.")] = 5e-4,
    eta: Annotated[float, typer.Option(help="Of EraseDiff's barrier.")] = 0.5,
    published_lr: Annotated[float | None, typer.Option(help="Of the public loop; 1e-5 in its scripts.")] = None,
    multiplier: Annotated[float, typer.Option(help="The public loop's lambda.")] = 1.0,
    inner_passes: Annotated[int, typer.Option(help="The public loop's K.")] = 1,
    every: Annotated[int, typer.Option(help="Kept updates between two looks.")] = 10,
    most: Annotated[int, typer.Option(help="Updates after which a contender gives up.")] = 200,
    samples: Annotated[tuple[int, int], typer.Option(help="Of the forgotten class, and of each other one.")] = (40, 8),
    seed: Annotated[int, typer.Option(help="Of batches, noise and samples.")] = 0,
    cache: Annotated[Path, typer.Option(help="What nano_sd/train.py left.")] = CACHE,
) -> None:
    console = Console(stderr=True)
    for name in (forgotten, anchor):
        if name not in CLASSES:
            raise typer.BadParameter(f"{name} is none of {', '.join(CLASSES)}")
    number = CLASSES.index(forgotten)
    try:
        judge = Judge.load(cache / "judge")
        task = Task.of_class(
            cache / "model", cache / "data", forgotten, f"a photo of {PHRASES[anchor]}", batch_size, seed, console
        )
        settings = Published(multiplier=multiplier, inner_passes=inner_passes, lr=published_lr or lr)
        contenders = [erasediff(task, lr, eta), published(task, settings)]
    except UserError as error:
        console.print(str(error), style="red", highlight=False)
        raise typer.Exit(2) from None
    base = look(load_text_to_image(task.checkpoint), judge, number, *samples, seed)
    console.print(f"Before: {base}")

    racing, lines = list(contenders), []
    while racing:
        for contender in list(racing):
            contender.advance(every)
            seen = look(contender.model, judge, number, *samples, seed)
            done = seen.satisfies(base)
            console.print(f"{contender.name} {contender.steps}: {seen}, {contender.cpu_seconds:.1f} s of CPU")
            if done or contender.steps >= most:
                racing.remove(contender)
                # Samples that the stopping did not look at.
                fresh = look(contender.model, judge, number, 2 * samples[0], 2 * samples[1], seed + 1)
                again = {"forgotten_again": fresh.forgotten, "retained_again": round(fresh.retained, 4)}
                lines.append(
                    {**line(contender, seen, base, reached=done, **again), "class": forgotten, "seed": seed}
                    | environment("cpu")
                )
    if all(found["reached"] for found in lines):
        seconds = {found["contender"]: found for found in lines}
        for unit in ("seconds", "cpu_seconds"):
            console.print(f"{seconds['published'][unit] / seconds['erasediff'][unit]:.1f} times faster in {unit}")
    print(append("time_to_forget", lines))


if __name__ == "__main__":
    torch.set_num_interop_threads(1)
    typer.run(main)

"""Seconds until a class is forgotten, against the public EraseDiff loop: ``python benchmarks/time_to_forget/run.py``.

Both start from the nano Stable Diffusion (``benchmarks/nano_sd``), see the same batches, and take turns in one process.
Every ``--every`` kept updates the judge looks at samples of each, from new noise at every look; a contender is done at
the second of two looks in a row at which the forgotten class is recognised in at most 3% of what is asked for it, and
the others on average within 3 points of the model before, from the same noise. Seconds count training alone. Appends to
results/time_to_forget.jsonl, with what was seen in samples that decided nothing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from contenders import Contender, Task, erasediff, published
from published import Published
from rich.console import Console

from erasediff.errors import UserError
from erasediff.models.base import LatentModel
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
LOOKS_IN_A_ROW = 2
LOOKS = 1000
"""More than one seed needs: the noise of seed n's looks is numbered from LOOKS n, whose own decides nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Shares recognised: of the forgotten class, and the mean over the others; None where that was not looked at."""

    forgotten: float
    retained: float | None

    def satisfies(self, base: Look) -> bool:
        assert base.retained is not None
        return (
            self.forgotten <= FORGOTTEN_LIMIT
            and self.retained is not None
            and self.retained >= base.retained - RETAINED_DROP
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Looker:
    """``asked`` samples of the forgotten class and ``others`` of each other one, from the noise of a number."""

    judge: Judge
    forgotten: int
    asked: int
    others: int

    def look(self, model: LatentModel, number: int, *, whole: bool = False) -> Look:
        """The others are drawn only where enough is forgotten, or the ``whole`` is asked for: they cost more."""
        forgotten = self._recognised(model, [self.forgotten] * self.asked, number)
        if forgotten > FORGOTTEN_LIMIT and not whole:
            return Look(forgotten=forgotten, retained=None)
        labels = [label for label in range(len(CLASSES)) if label != self.forgotten for _ in range(self.others)]
        # As many of each: the mean over classes is the mean over samples.
        return Look(forgotten=forgotten, retained=self._recognised(model, labels, number))

    def _recognised(self, model: LatentModel, labels: list[int], number: int) -> float:
        drawn = model.sample(
            [prompt(label) for label in labels],
            guidance_scale=GUIDANCE_SCALE,
            num_inference_steps=INFERENCE_STEPS,
            seed=number,
            batch_size=100,
        )
        answers, _ = self.judge.answer(as_grey(drawn))
        return (answers == torch.tensor(labels)).double().mean().item()


def line(contender: Contender, seen: Look, before: Look, *, reached: bool) -> dict[str, Any]:
    """``seen`` and ``before`` are of samples that decided nothing."""
    assert seen.retained is not None
    assert before.retained is not None
    return {
        "benchmark": "time to forget",
        "contender": contender.name,
        **contender.settings,
        "steps": contender.steps,
        "seconds": round(contender.seconds, 3),
        "cpu_seconds": round(contender.cpu_seconds, 3),
        "reached": reached,
        "forgotten": seen.forgotten,
        "retained": round(seen.retained, 4),
        "retained_before": round(before.retained, 4),
    }


def main(
    forgotten: Annotated[str, typer.Option(help="The class to forget.")] = "sneaker",
    anchor: Annotated[str, typer.Option(help="The class drawn in its place.")] = "ankle boot",
    batch_size: Annotated[int, typer.Option(help="Retained, and forgotten, images per step; 16 as published.")] = 16,
    lr: Annotated[float, typer.Option(help="Of EraseDiff, and of the public loop unless --published-lr.")] = 5e-4,
    published_batch_size: Annotated[int | None, typer.Option(help="Of the public loop, if it is another.")] = None,
    eta: Annotated[float, typer.Option(help="Of EraseDiff's barrier.")] = 0.5,
    ema_decay: Annotated[
        float | None, typer.Option(help="Of EraseDiff's averaged weights; the scripts have none.")
    ] = 0.9,
    published_lr: Annotated[float | None, typer.Option(help="Of the public loop; 1e-5 in its scripts.")] = None,
    published_ema_decay: Annotated[float | None, typer.Option(help="Of averaged weights for the public loop.")] = None,
    multiplier: Annotated[float, typer.Option(help="The public loop's lambda.")] = 1.0,
    inner_passes: Annotated[int, typer.Option(help="The public loop's K.")] = 1,
    every: Annotated[int, typer.Option(help="Kept updates between two looks.")] = 10,
    most: Annotated[int, typer.Option(help="Updates after which a contender gives up.")] = 200,
    samples: Annotated[tuple[int, int], typer.Option(help="Of the forgotten class, and of each other one.")] = (
        100,
        12,
    ),
    only: Annotated[str | None, typer.Option(help="erasediff or published, without the other.")] = None,
    seed: Annotated[int, typer.Option(help="Of batches, noise and samples.")] = 0,
    cache: Annotated[Path, typer.Option(help="What nano_sd/train.py left.")] = CACHE,
) -> None:
    console = Console(stderr=True)
    for name in (forgotten, anchor):
        if name not in CLASSES:
            raise typer.BadParameter(f"{name} is none of {', '.join(CLASSES)}")
    number = CLASSES.index(forgotten)
    try:
        looker = Looker(judge=Judge.load(cache / "judge"), forgotten=number, asked=samples[0], others=samples[1])
        task = Task.of_class(
            cache / "model", cache / "data", forgotten, f"a photo of {PHRASES[anchor]}", batch_size, seed, console
        )
        settings = Published(multiplier=multiplier, inner_passes=inner_passes, lr=published_lr or lr)
        theirs = replace(task, batch_size=published_batch_size or batch_size)
        contenders = {
            "erasediff": lambda: erasediff(task, lr, eta, ema_decay),
            "published": lambda: published(theirs, settings, published_ema_decay),
        }
        racing = [make() for name, make in contenders.items() if only in (None, name)]
    except UserError as error:
        console.print(str(error), style="red", highlight=False)
        raise typer.Exit(2) from None
    original = load_text_to_image(task.checkpoint)

    lines, passed, number_of_look = [], dict.fromkeys(contenders, 0), LOOKS * seed
    while racing:
        number_of_look += 1
        base: Look | None = None
        for contender in list(racing):
            contender.advance(every)
            with contender.result():
                seen = looker.look(contender.model, number_of_look)
            if seen.retained is not None and base is None:
                base = looker.look(original, number_of_look, whole=True)
            good = base is not None and seen.satisfies(base)
            passed[contender.name] = passed[contender.name] + 1 if good else 0
            console.print(f"{contender.name} {contender.steps}: {seen}, {contender.cpu_seconds:.1f} s of CPU")
            done = passed[contender.name] == LOOKS_IN_A_ROW
            if done or contender.steps >= most:
                racing.remove(contender)
                with contender.result():
                    fresh = looker.look(contender.model, LOOKS * seed, whole=True)
                before = looker.look(original, LOOKS * seed, whole=True)
                found = line(contender, fresh, before, reached=done)
                lines.append(found | {"class": forgotten, "seed": seed} | environment("cpu"))
                console.print(f"{contender.name}, fresh samples: {fresh}")
    if len(lines) == len(contenders) and all(found["reached"] for found in lines):
        seconds = {found["contender"]: found for found in lines}
        for unit in ("seconds", "cpu_seconds"):
            console.print(f"{seconds['published'][unit] / seconds['erasediff'][unit]:.1f} times faster in {unit}")
    print(append("time_to_forget", lines))


if __name__ == "__main__":
    torch.set_num_interop_threads(1)
    typer.run(main)

"""Cost of a whole EraseDiff step on the demo's model beside plain fine-tuning on the same number of samples.

``python benchmarks/whole_step.py [--threads N]``. All contenders take a step in turn, so that they share whatever the
machine does meanwhile; the ratio is the median over turns.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn import functional

from erasediff import EraseDiff, Norm, Process, Relabel, UniformNoise
from erasediff.methods import FineTune
from erasediff.models import PixelModel
from erasediff_kernels import ConstrainedAdamW

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
from record import append, environment

Contender = Callable[[], object]


def contenders(batch_size: int) -> dict[str, Contender]:
    """Steps over 2 ``batch_size`` samples each: half retained and half forgotten, or all retained."""
    generator = torch.Generator().manual_seed(0)

    def batch(size: int, label: int) -> dict[str, torch.Tensor]:
        return {
            "sample": torch.randn(size, 1, 8, 8, generator=generator),
            "class_labels": torch.full((size,), label),
        }

    retain, forget, whole = batch(batch_size, 1), batch(batch_size, 3), batch(2 * batch_size, 1)

    def solver(make: Callable[..., Any], **options: Any) -> Any:
        model = PixelModel.build(num_classes=10)
        optimizer = ConstrainedAdamW(model.unet.parameters(), lr=1e-4, ema_decay=0.9)
        return make(model.unet, optimizer, process=Process.from_scheduler(model.scheduler), **options)

    finetune = solver(FineTune)
    uniform = solver(EraseDiff, barrier=Norm(0.1), target=UniformNoise())
    relabel = solver(EraseDiff, barrier=Norm(0.5), target=Relabel({"class_labels": torch.tensor([4])}))
    plain = plain_step()
    return {
        "finetune": lambda: finetune.step(whole),
        "plain torch": lambda: plain(whole),
        "erasediff": lambda: uniform.step(retain, forget),
        "erasediff relabel": lambda: relabel.step(retain, forget),
    }


def plain_step() -> Callable[[dict[str, torch.Tensor]], None]:
    """The loop that people write: torch's noise, loss, clipping and fused AdamW, and an average kept beside it."""
    model = PixelModel.build(num_classes=10)
    unet, scheduler = model.unet, model.scheduler
    parameters = list(unet.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step(batch: dict[str, torch.Tensor]) -> None:
        sample = batch["sample"]
        noise = torch.randn_like(sample)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(sample),))
        noisy = scheduler.add_noise(sample, noise, timesteps)
        prediction = unet(noisy, timesteps, class_labels=batch["class_labels"], return_dict=False)[0]
        functional.mse_loss(prediction, scheduler.get_velocity(sample, noise, timesteps)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 0.1)

    return step


def main(
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    turns: Annotated[int, typer.Option(help="Steps of each contender that count.")] = 40,
    batch_size: Annotated[int, typer.Option(help="Of each half.")] = 64,
) -> None:
    torch.set_num_threads(threads)
    runs = contenders(batch_size)
    for run in runs.values():
        run()
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    lines = [
        environment("cpu")
        | {
            "benchmark": "whole step",
            "contender": name,
            "batch_size": 2 * batch_size,
            "seconds": statistics.median(values),
            "best_seconds": min(values),
            "times_finetune": statistics.median(a / b for a, b in zip(values, seconds["finetune"], strict=True)),
            "turns": turns,
        }
        for name, values in seconds.items()
    ]
    append("whole_step", lines)
    for line in lines:
        print(f"{line['contender']:20} {line['seconds'] * 1e3:8.1f} ms {line['times_finetune']:6.2f} x fine-tuning")


if __name__ == "__main__":
    typer.run(main)

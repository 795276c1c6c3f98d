"""Unlearning in a plain PyTorch loop."""

import tiny
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup

from erasediff import EraseDiff

STEPS = 20


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet = tiny.unet().to(device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, STEPS)
    unlearner = EraseDiff(unet, optimizer, process=tiny.SCHEDULER)

    batches = zip(tiny.batches(STEPS, stream=0), tiny.batches(STEPS, stream=1), strict=True)
    for step, (retain, forget) in enumerate(batches):
        retain, forget = ({k: v.to(device) for k, v in batch.items()} for batch in (retain, forget))
        report = unlearner.step(retain, forget)
        schedule.step()
        if (step + 1) % 5 == 0:  # reading a report waits for the device
            print(f"{step + 1} retain {report.retain_loss:.5f} forget {report.forget_loss:.5f} {report.multiplier:.5f}")
    unet.save_pretrained("unlearned")


if __name__ == "__main__":
    main()

"""Unlearning under Hugging Face Accelerate: with its DeepSpeed plugin, and unchanged under DDP or alone."""

import tiny
import torch
from accelerate import Accelerator

from erasediff import EraseDiff

STEPS = 20


def main() -> None:
    accelerator = Accelerator()
    unet = tiny.unet()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    unlearner = EraseDiff(unet, optimizer, process=tiny.SCHEDULER)

    # From torch: on a machine without GPUs, Accelerate takes each DeepSpeed process for a run of its own.
    has_group = torch.distributed.is_initialized()
    rank, size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if has_group else (0, 1)
    streams = (tiny.batches(STEPS, stream=stream, rank=rank, size=size) for stream in range(2))
    for step, (retain, forget) in enumerate(zip(*streams, strict=True)):
        retain, forget = ({k: v.to(accelerator.device) for k, v in batch.items()} for batch in (retain, forget))
        report = unlearner.step(retain, forget)
        if rank == 0 and (step + 1) % 5 == 0:
            print(f"{step + 1} retain {report.retain_loss:.5f} forget {report.forget_loss:.5f} {report.multiplier:.5f}")

    state = dict(unlearner.full_weights())
    if rank == 0:
        whole = tiny.unet()
        whole.load_state_dict(state)
        whole.save_pretrained("unlearned")
    accelerator.end_training()


if __name__ == "__main__":
    main()

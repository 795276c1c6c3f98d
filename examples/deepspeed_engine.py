"""Unlearning with a DeepSpeed engine that is yours: ZeRO stage 3, the learning rate from its own schedule."""

import os

import deepspeed
import tiny
import torch

from erasediff import EraseDiff

STEPS = 20


def main() -> None:
    deepspeed.init_distributed()
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": 6 // size,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": int(os.environ.get("STAGE", "3"))},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-4, "warmup_num_steps": 2}},
    }
    unet = tiny.unet()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    engine, *_ = deepspeed.initialize(model=unet, optimizer=optimizer, config=config)
    unlearner = EraseDiff(engine, process=tiny.SCHEDULER)

    streams = (tiny.batches(STEPS, stream=stream, rank=rank, size=size) for stream in range(2))
    for step, (retain, forget) in enumerate(zip(*streams, strict=True)):
        retain, forget = ({k: v.to(engine.device) for k, v in batch.items()} for batch in (retain, forget))
        report = unlearner.step(retain, forget)
        if rank == 0 and (step + 1) % 5 == 0:
            print(f"{step + 1} retain {report.retain_loss:.5f} forget {report.forget_loss:.5f} {report.multiplier:.5f}")

    state = dict(unlearner.full_weights())
    if rank == 0:
        whole = tiny.unet()
        whole.load_state_dict(state)
        whole.save_pretrained("unlearned")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

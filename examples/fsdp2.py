"""Unlearning with FSDP2: each process holds a shard of weights, gradients and the optimizer's state."""

import tiny
import torch
from torch.distributed.fsdp import fully_shard

from erasediff import EraseDiff

STEPS = 20


def main() -> None:
    has_gpu = torch.cuda.is_available()
    torch.distributed.init_process_group("nccl" if has_gpu else "gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    device = torch.device("cuda", torch.distributed.get_node_local_rank()) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    unet = tiny.unet().to(device)
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        fully_shard(block)
    fully_shard(unet)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    unlearner = EraseDiff(unet, optimizer, process=tiny.SCHEDULER)

    streams = (tiny.batches(STEPS, stream=stream, rank=rank, size=size) for stream in range(2))
    for step, (retain, forget) in enumerate(zip(*streams, strict=True)):
        retain, forget = ({k: v.to(device) for k, v in batch.items()} for batch in (retain, forget))
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

"""Processes and gradients: launch, collectives, model wrapping (DDP, FSDP2, ZeRO) and gradient stores."""

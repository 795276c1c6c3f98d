"""Runs of several processes: who takes part, and what they agree on."""

from erasediff.distributed.world import World

__all__ = ["World"]

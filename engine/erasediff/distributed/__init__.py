"""Runs of several processes: who takes part, and what they agree on."""

from erasediff.distributed.peers import PeerFailed, Peers
from erasediff.distributed.world import World

__all__ = ["PeerFailed", "Peers", "World"]

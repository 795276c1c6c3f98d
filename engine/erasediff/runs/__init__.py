"""Runs on disk: atomic writes, bit-exact state, checkpoints that survive a kill, and the loop that makes them."""

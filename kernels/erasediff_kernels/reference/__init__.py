"""Eager reference of every operator: torch only, fp32 or fp64 inside, the truth that other implementations answer to."""

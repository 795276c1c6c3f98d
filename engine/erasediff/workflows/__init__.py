"""Commands as Python functions: train, unlearn, sample, evaluate, benchmark, and the demo that composes them."""

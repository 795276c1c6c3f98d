"""What the commands do, callable from Python: train, unlearn, sample, evaluate, and the demo that composes them."""

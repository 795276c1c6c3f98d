"""Training jobs: the loop, its learning-rate schedule, checkpoints, run folders and graceful stops."""

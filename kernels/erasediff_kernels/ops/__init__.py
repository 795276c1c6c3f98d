"""Public functions, one module per operator: each checks its arguments and calls `torch.ops.erasediff.<op>`."""

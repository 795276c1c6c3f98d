"""DeepSpeed ZeRO: every name of DeepSpeed that its documentation does not promise, for the versions it was tried with.

A layout is how an engine keeps what the optimizer updates. Its ``flats`` are the tensors of the optimizer's own groups:
this process's fp32 partitions (ZeRO 1-3), or whole parameters or their fp32 masters (stage 0). Its lists of gradients
have one tensor for each of them.
"""

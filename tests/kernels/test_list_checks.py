"""The two checks of lists, in C++ (`csrc/lists.h`) and in Python (`ops/_lists.py`), accept the same ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from erasediff_kernels import available_backends, constrained_adamw_, constrained_sgd_, gradient_gram, use_backend

SHAPES = [(3,), (4, 5), (2, 1, 3)]
OPERATORS = {
    "gradient_gram": gradient_gram,
    "constrained_adamw_": constrained_adamw_,
    "constrained_sgd_": constrained_sgd_,
}
LISTS = {
    "gradient_gram": ["retain", "forget", "masks"],
    "constrained_adamw_": ["params", "exp_avgs", "exp_avg_sqs", "retain", "forget", "ema", "copies", "masks"],
    "constrained_sgd_": ["params", "momentum_buffers", "retain", "forget", "ema", "copies", "masks"],
}
SCALARS = ["multiplier", "clip_scale", "lr", "step", "finite"]


def reverse_order(t: Tensor) -> Tensor:
    """The same values, in memory with the first dimension innermost."""
    return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))


def stride_of_ones(t: Tensor) -> Tensor:
    """Another stride for dimensions of one element, which says nothing."""
    strides = (99 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.as_strided(t.shape, tuple(strides))


# What may be wrong with a tensor, or only unusual: some of it is refused, some converted, some taken as it is.
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "double": Tensor.double,
    "bfloat16": Tensor.bfloat16,
    "integers": Tensor.int,
    "bytes": lambda t: t.to(torch.uint8),
    "one more element": lambda t: torch.cat((t.flatten(), t.new_ones(1))),
    "flattened": Tensor.flatten,
    "one more dimension": lambda t: t[None],
    "two elements": lambda t: torch.stack((t.flatten()[0], t.flatten()[0])),
    "other order": reverse_order,
    "stride of ones": stride_of_ones,
    "gaps": lambda t: torch.stack((t, t), dim=-1)[..., 0],
    "overlaps": lambda t: t[..., :1].expand(t.shape),
}


def call(backend: str, op: str, reverse: bool, changes: list[tuple[str, int, str]]) -> list[Tensor] | None:
    """Tensors that the operator returns or writes; None where it refuses its arguments."""
    generator = torch.Generator().manual_seed(0)
    arguments: dict[str, Any] = {}
    for name in LISTS[op]:
        tensors = [torch.rand(shape, generator=generator) for shape in SHAPES]
        arguments[name] = [reverse_order(t) for t in tensors] if reverse else tensors
    arguments["masks"] = [torch.full(((t.numel() + 7) // 8,), 0b0110_1101, dtype=torch.uint8) for t in tensors]
    if op != "gradient_gram":
        arguments |= {name: torch.tensor(0.5) for name in SCALARS} | {
            "step": torch.tensor(3.0),
            "finite": torch.tensor(True),
        }
        arguments |= {"momentum": 0.9} if op == "constrained_sgd_" else {"eps": 0.1}
    for name, index, change in changes:
        if name not in arguments:
            continue
        if isinstance(arguments[name], list):
            arguments[name][index] = CHANGES[change](arguments[name][index])
        elif change not in ("overlaps", "stride of ones", "other order"):
            arguments[name] = CHANGES[change](arguments[name])
    try:
        with use_backend(backend):
            result = OPERATORS[op](**arguments)
    except ValueError:
        return None
    return [result] if isinstance(result, Tensor) else [t for name in LISTS[op] for t in arguments[name]]


changed = st.tuples(
    st.sampled_from(sorted({name for names in LISTS.values() for name in names} | set(SCALARS))),
    st.integers(0, len(SHAPES) - 1),
    st.sampled_from(sorted(CHANGES)),
)


@pytest.mark.skipif("compiled" not in available_backends("cpu"), reason="the C++ operators are not built")
@settings(max_examples=300, deadline=None)
@given(op=st.sampled_from(sorted(OPERATORS)), reverse=st.booleans(), changes=st.lists(changed, max_size=3))
@example(op="constrained_sgd_", reverse=True, changes=[("momentum_buffers", 2, "stride of ones")])
@example(op="gradient_gram", reverse=True, changes=[("forget", 2, "stride of ones")])
def test_the_checks_agree(op: str, reverse: bool, changes: list[tuple[str, int, str]]) -> None:
    """With the compiled backend C++ looks first, with the reference only Python does: one verdict, one result."""
    compiled, reference = (call(backend, op, reverse, changes) for backend in ("compiled", "reference"))
    assert (compiled is None) == (reference is None)
    for first, second in zip(compiled or [], reference or [], strict=True):
        torch.testing.assert_close(first, second, rtol=1e-2, atol=1e-2)


def test_the_stride_of_a_dimension_of_one_does_not_matter(device: str) -> None:
    """As channels_last weights of 1x1 convolutions, whose copies may have other strides."""
    results = []
    for change in (lambda t: t, stride_of_ones):
        torch.manual_seed(0)
        params, buffers, retain, forget = ([reverse_order(torch.randn(2, 1, 3)).to(device)] for _ in range(4))
        mask = [torch.tensor([0b01_0110], dtype=torch.uint8, device=device)]
        scalars = {name: torch.tensor(0.5, device=device) for name in SCALARS[:-1]}
        forget = [change(t) for t in forget]
        gram = gradient_gram(retain, forget, mask)
        finite = torch.tensor(True, device=device)
        buffers = [change(t) for t in buffers]
        constrained_sgd_(params, buffers, retain, forget, **scalars, finite=finite, momentum=0.9, masks=mask)
        results.append((gram, params[0], buffers[0]))
    assert all(map(torch.equal, *results))

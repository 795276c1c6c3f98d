"""`torch.library.opcheck` of every operator: schema, fake, autograd registration and AOT dispatch."""

from typing import Any

import pytest
import torch

from erasediff_kernels.ops.scatter_outer import group_by_latent

LISTS = [(3,), (4, 5)]


def arguments(op: str, device: str, requires_grad: bool) -> list[tuple[Any, ...]]:
    """Argument lists for one operator, on `device`."""
    torch.manual_seed(0)

    def vector(n: int = 2) -> torch.Tensor:
        return torch.rand(n, device=device)

    def tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        return [torch.rand(shape, device=device).to(dtype) for shape in LISTS]

    def scalar(value: Any) -> torch.Tensor:
        return torch.tensor(value, device=device)

    def codes(dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.randint(1, 100, shape, device=device).to(dtype) for shape in LISTS]

    def absmaxes() -> list[torch.Tensor]:
        return [vector(1) for _ in LISTS]

    empty: tuple[list[torch.Tensor], ...] = ([], [], [], [])
    ids, key = torch.tensor([3, 4], device=device), torch.tensor([1, 2], device=device)
    data = torch.randn(2, 3, 5, device=device)
    strided = torch.randn(2, 5, 3, device=device).transpose(1, 2)
    leaves = [data.clone().requires_grad_(requires_grad), strided.clone().requires_grad_(requires_grad)]
    update = (scalar(0.5), scalar(0.9), scalar(True), scalar(0.1), scalar(3.0))
    key_for_half = [torch.rand(shape, device=device).bfloat16() for shape in LISTS]
    masks = [torch.tensor([5], dtype=torch.uint8, device=device), torch.ones(3, dtype=torch.uint8, device=device)]
    code = torch.rand(2, 3, device=device, requires_grad=requires_grad)
    indices = torch.tensor([[0, 3, 5], [6, 3, 1]], dtype=torch.int32, device=device)
    weight = torch.randn(7, 5, device=device, requires_grad=requires_grad)
    gram = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64, device=device)
    return {
        "philox_bits": [(ids, key, 1, 7)],
        "philox_noise": [
            (ids, key, 1, [3, 5], "normal", torch.float32),
            (ids, key, 1, [3], "uniform", torch.bfloat16),
        ],
        "add_noise": [
            (leaves[0], vector(), vector(), data, None, None, 0),
            (leaves[1], vector(), vector(), None, ids, key, 1),
        ],
        "denoising_loss": [
            (leaves[0], strided, vector(), vector(), vector(), data, None, None, 0, "v_prediction"),
            (leaves[1], data, vector(), vector(), vector(), None, ids, key, 1, "epsilon"),
        ],
        "deviation_loss": [
            (leaves[0], vector(), strided, None, None, 0, "uniform"),
            (leaves[1], vector(), None, ids, key, 1, "uniform"),
        ],
        "gradient_gram": [(tensors(), tensors(), []), (tensors(torch.bfloat16), [], masks)],
        "constraint_multiplier": [
            (gram, "norm", 0.1, None, None),
            (gram, "gap", 0.1, scalar(1.5), 2.0),
        ],
        "constrained_adamw_": [
            (tensors(), tensors(), tensors(), [], [], tensors(), *empty, *update, 0.9, 0.99, 1e-8, 0.1, 0.0, None),
            (
                *(key_for_half, tensors(), tensors(), [], [], tensors(), tensors(), tensors()),
                *(tensors(torch.float16), masks, *update, 0.9, 0.99, 1e-8, 0.1, 0.9, key),
            ),
            (
                *(tensors(), codes(torch.int8), codes(torch.uint8), absmaxes(), absmaxes(), tensors(), *empty),
                *(*update, 0.9, 0.99, 1e-8, 0.1, 0.0, None),
            ),
        ],
        "topk_encode": [(leaves[0].detach().reshape(2, 15).requires_grad_(requires_grad), 4)],
        "sparse_decode": [
            (code, indices, weight, None),
            (code, indices, weight, weight[0].detach().requires_grad_(requires_grad)),
        ],
        "gather_dot": [(data[:, 0], indices, weight.detach())],
        "scatter_outer": [(code.detach(), data[:, 0], *group_by_latent(indices, 7))],
        "constrained_sgd_": [
            (tensors(), [], tensors(), tensors(), [], [], [], *update, 0.0, False, 0.1, 0.0, None),
            (
                *(key_for_half, tensors(), tensors(), tensors(), tensors(), tensors(torch.float16), masks),
                *(*update, 0.9, True, 0.1, 0.9, key),
            ),
        ],
    }[op]


@pytest.mark.parametrize(
    ("op", "requires_grad"),
    [
        ("philox_bits", False),
        ("philox_noise", False),
        ("add_noise", False),
        ("add_noise", True),
        ("denoising_loss", False),
        ("denoising_loss", True),
        ("deviation_loss", False),
        ("deviation_loss", True),
        ("gradient_gram", False),
        ("constraint_multiplier", False),
        ("topk_encode", False),
        ("topk_encode", True),
        ("sparse_decode", False),
        ("sparse_decode", True),
        ("gather_dot", False),
        ("scatter_outer", False),
        ("constrained_adamw_", False),
        ("constrained_sgd_", False),
    ],
)
def test_opcheck(device: str, op: str, requires_grad: bool) -> None:
    for args in arguments(op, device, requires_grad):
        torch.library.opcheck(getattr(torch.ops.erasediff, op).default, args)

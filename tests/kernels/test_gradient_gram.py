import pytest
import torch
from torch import Tensor

from erasediff_kernels import gradient_gram, pack_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(0,), (1,), (), (3,), (5, 7), (8, 8), (3, 4, 3, 3), (1000,), (2, 4099)]


def gradients(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def exact_gram(retain: list[Tensor], forget: list[Tensor]) -> Tensor:
    r, g = (torch.cat([t.double().reshape(-1).cpu() for t in tensors]) for tensors in (retain, forget))
    return torch.stack((r.dot(r), r.dot(g), g.dot(g)))


@pytest.mark.parametrize("forget_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("retain_dtype", DTYPES, ids=str)
def test_against_fp64(device: str, retain_dtype: torch.dtype, forget_dtype: torch.dtype) -> None:
    r, g = gradients(SHAPES, retain_dtype, device), gradients(SHAPES, forget_dtype, device)
    gram = gradient_gram(r, g)
    assert gram.dtype == torch.float64
    assert gram.device.type == device
    # Products of halves are exact in fp32 and sums are in fp64 or compensated: the fp32 default is generous.
    torch.testing.assert_close(gram.cpu(), exact_gram(r, g), rtol=1e-7, atol=1e-6)


def test_dtypes_mixed_in_one_list(device: str) -> None:
    r = [torch.randn(97, device=device).to(dtype) for dtype in DTYPES]
    g = [torch.randn(97, device=device).to(dtype) for dtype in reversed(DTYPES)]
    torch.testing.assert_close(gradient_gram(r, g).cpu(), exact_gram(r, g), rtol=1e-7, atol=1e-6)


def test_sum_is_accurate_where_fp32_is_not(device: str) -> None:
    tensor = torch.full((100_003,), 0.1, device=device)
    gram = gradient_gram([tensor], [-tensor]).cpu()
    expected = 100_003 * float(torch.tensor(0.1)) ** 2
    torch.testing.assert_close(
        gram, torch.tensor([expected, -expected, expected], dtype=torch.float64), rtol=1e-7, atol=0.0
    )


def test_no_forget_gradient(device: str) -> None:
    r = gradients(SHAPES, torch.float32, device)
    gram = gradient_gram(r, []).cpu()
    torch.testing.assert_close(gram[0], exact_gram(r, r)[0], rtol=1e-7, atol=0.0)
    assert gram[1:].tolist() == [0.0, 0.0]


def test_only_empty_tensors(device: str) -> None:
    empty = [torch.zeros(0, 3, device=device)] * 2
    assert gradient_gram(empty, empty).tolist() == [0.0, 0.0, 0.0]


def test_masks(device: str) -> None:
    r, g = gradients(SHAPES, torch.float32, device), gradients(SHAPES, torch.float32, device)
    masks = [torch.rand_like(t) < 0.5 for t in r]
    gram = gradient_gram(r, g, [pack_mask(mask) for mask in masks])
    kept = [[t * mask for t, mask in zip(tensors, masks, strict=True)] for tensors in (r, g)]
    torch.testing.assert_close(gram.cpu(), exact_gram(*kept), rtol=1e-7, atol=1e-6)


def test_masked_nan_counts_as_zero(device: str) -> None:
    r = torch.tensor([1.0, float("nan")], device=device)
    assert gradient_gram([r], [r], [pack_mask(~r.isnan())]).tolist() == [1.0, 1.0, 1.0]


def test_layouts(device: str) -> None:
    """Strides do not matter, also where those of r and g differ."""
    base = torch.randn(2, 4, 6, 5, 3, device=device)
    r, g = base[0].contiguous(), base[1].contiguous()
    expected = exact_gram([r], [g])
    last = g.to(memory_format=torch.channels_last)
    sliced = torch.stack((r, r), dim=-1)[..., 0]
    pairs = [(r, last), (last, r), (sliced, g), (g, sliced), (r.to(memory_format=torch.channels_last), last)]
    for first, second in pairs:
        gram = gradient_gram([first], [second]).cpu()
        torch.testing.assert_close(gram[1], expected[1], rtol=1e-7, atol=1e-6)


def test_thousands_of_tiny_tensors(device: str, many: int) -> None:
    shapes = [(index % 7,) for index in range(many)]
    r, g = gradients(shapes, torch.float32, device), gradients(shapes, torch.float32, device)
    torch.testing.assert_close(gradient_gram(r, g).cpu(), exact_gram(r, g), rtol=1e-7, atol=1e-5)


def test_same_bits_from_run_to_run(device: str) -> None:
    r, g = gradients(SHAPES, torch.float32, device), gradients(SHAPES, torch.float32, device)
    first = gradient_gram(r, g)
    assert all(torch.equal(first, gradient_gram(r, g)) for _ in range(3))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_non_finite_values_propagate(device: str, bad: float) -> None:
    r, g = torch.ones(1000, device=device), torch.ones(1000, device=device)
    r[777] = bad
    gram = gradient_gram([torch.ones(5, device=device), r], [torch.ones(5, device=device), g])
    assert not gram[:2].isfinite().any()
    assert gram[2] == 1005.0


def test_huge_fp32_values_do_not_overflow(device: str) -> None:
    huge = torch.full((10,), 1e30, device=device)
    torch.testing.assert_close(gradient_gram([huge], [huge]).cpu(), exact_gram([huge], [huge]), rtol=1e-6, atol=0.0)


def test_more_than_int32_elements() -> None:
    assert gradient_gram([torch.empty(2**31 + 1, device="meta")], []).shape == (3,)


def test_opcheck(device: str) -> None:
    shapes: list[tuple[int, ...]] = [(3,), (4, 5)]
    r, g = gradients(shapes, torch.float32, device), gradients(shapes, torch.float32, device)
    masks = [torch.tensor([5], dtype=torch.uint8, device=device), torch.ones(3, dtype=torch.uint8, device=device)]
    for arguments in ((r, g, []), (gradients(shapes, torch.bfloat16, device), [], masks)):
        torch.library.opcheck(torch.ops.erasediff.gradient_gram.default, arguments)


def test_bad_arguments() -> None:
    r = [torch.ones(3), torch.ones(4)]
    with pytest.raises(ValueError, match="empty"):
        gradient_gram([], [])
    with pytest.raises(ValueError, match="forget has 1"):
        gradient_gram(r, r[:1])
    with pytest.raises(ValueError, match=r"forget\[1\]"):
        gradient_gram(r, [torch.ones(3), torch.ones(5)])
    with pytest.raises(ValueError, match="int32"):
        gradient_gram(r, [t.int() for t in r])
    with pytest.raises(ValueError, match="masks"):
        gradient_gram(r, r, [torch.ones(1, dtype=torch.uint8)])
    with pytest.raises(ValueError, match="pack_mask"):
        gradient_gram(r, r, [torch.ones(3, dtype=torch.bool)] * 2)

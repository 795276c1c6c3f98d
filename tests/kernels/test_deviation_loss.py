import pytest
import torch
from torch import Tensor

from erasediff_kernels import deviation_loss, philox_noise

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(0, 3), (2, 0), (1, 1), (3,), (3, 5, 7), (2, 4, 17, 17)]


def formula(prediction: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    error = prediction - target
    numel = max(1, error[:1].numel())
    loss = (weight * error.square().reshape(error.shape[0], error[:1].numel()).sum(dim=1) / numel).sum()
    return loss, 2.0 / numel * weight.view(-1, *(1,) * (error.dim() - 1)) * error


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    prediction = torch.randn(shape, device=device).to(dtype)
    weight = torch.rand(shape[0], device=device, dtype=wide)
    return (
        prediction,
        weight,
        torch.randint(0, 2**56, shape[:1], device=device),
        torch.tensor([3, 4], device=device),
    )


@pytest.mark.parametrize("source", ["uniform", "normal", "given"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, source: str, assert_within_twice
) -> None:
    prediction, weight, ids, key = inputs(shape, dtype, device)
    if source == "given":
        target = torch.randn(shape, device=device).to(dtype)
        loss, grad = deviation_loss(prediction, target=target, weight=weight)
    else:
        target = philox_noise(ids, key, 7, shape[1:], source, torch.float64)
        loss, grad = deviation_loss(prediction, distribution=source, weight=weight, sample_ids=ids, key=key, role=7)
    exact = formula(prediction.double(), target.double(), weight.double())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    torch.testing.assert_close(loss, exact[0].to(wide))
    if dtype.itemsize == 2:
        in_half = formula(prediction, target.to(dtype), weight.to(dtype))
        assert_within_twice(grad, in_half[1], exact[1])
    else:
        torch.testing.assert_close(grad, exact[1].to(dtype))


def test_strides_do_not_matter(device: str) -> None:
    prediction, _, ids, key = inputs((2, 4, 6, 6), torch.float32, device)
    expected = deviation_loss(prediction, sample_ids=ids, key=key)
    result = deviation_loss(prediction.to(memory_format=torch.channels_last), sample_ids=ids, key=key)
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(result.grad, expected.grad)
    assert result.grad.is_contiguous()


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_gradcheck(device: str, distribution: str) -> None:
    prediction, weight, ids, key = inputs((2, 5), torch.float64, device)

    def loss(tensor: Tensor) -> Tensor:
        return deviation_loss(tensor, distribution=distribution, weight=weight, sample_ids=ids, key=key).loss

    assert torch.autograd.gradcheck(loss, (prediction.requires_grad_(),))


def test_more_than_int32_elements() -> None:
    prediction = torch.empty(3, 2**31 + 1, device="meta")
    loss, grad = deviation_loss(prediction, target=prediction)
    assert loss.shape == ()
    assert grad.shape == prediction.shape


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device: str, requires_grad: bool) -> None:
    ids, key = torch.tensor([3, 4], device=device), torch.tensor([1, 2], device=device)
    weight = torch.rand(2, device=device)
    sample, strided = torch.randn(2, 3, 5, device=device), torch.randn(2, 5, 3, device=device).transpose(1, 2)
    for x, target in ((sample, (strided, None, None, 0)), (strided.clone(), (None, ids, key, 1))):
        arguments = (x.requires_grad_(requires_grad), weight, *target, "uniform")
        torch.library.opcheck(torch.ops.erasediff.deviation_loss.default, arguments)


def test_bad_arguments() -> None:
    prediction, _, ids, key = inputs((2, 5), torch.float32, "cpu")
    with pytest.raises(ValueError, match="distribution"):
        deviation_loss(prediction, distribution="beta", sample_ids=ids, key=key)
    with pytest.raises(ValueError, match="neither"):
        deviation_loss(prediction)
    with pytest.raises(ValueError, match="both"):
        deviation_loss(prediction, target=prediction, sample_ids=ids, key=key)
    with pytest.raises(ValueError, match="target"):
        deviation_loss(prediction, target=prediction[:1])

import pytest
import torch
from torch import Tensor

from erasediff_kernels import denoising_loss, philox_noise

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(0, 3), (2, 0), (1, 1), (3,), (3, 5, 7), (2, 4, 17, 17)]
PREDICTION_TYPES = ["epsilon", "v_prediction", "sample", "flow_prediction"]


def column(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(-1, *(1,) * (like.dim() - 1))


def formula(
    prediction: Tensor, sample: Tensor, alpha: Tensor, sigma: Tensor, weight: Tensor, noise: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """The definition in plain torch, in the dtype of its arguments."""
    alpha, sigma = column(alpha, sample), column(sigma, sample)
    target = {
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * sample,
        "sample": sample,
        "flow_prediction": noise - sample,
    }[kind]
    error = prediction - target
    numel = max(1, error[:1].numel())
    loss = (weight * error.square().reshape(error.shape[0], error[:1].numel()).sum(dim=1) / numel).sum()
    return loss, 2.0 / numel * column(weight, error) * error


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    batch = shape[0]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ids, key = torch.randint(0, 2**56, (batch,), device=device), torch.tensor([3, 4], device=device)
    prediction, sample = torch.randn(2, *shape, device=device).to(dtype)
    alpha, sigma, weight = torch.rand(3, batch, device=device, dtype=wide)
    return {
        "prediction": prediction,
        "sample": sample,
        "alpha": alpha,
        "sigma": sigma,
        "weight": weight,
        "sample_ids": ids,
        "key": key,
    }


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, prediction_type: str, assert_within_twice
) -> None:
    x = inputs(shape, dtype, device)
    noise = philox_noise(x["sample_ids"], x["key"], 2, shape[1:], dtype=torch.float64)
    operands = [x[name] for name in ("prediction", "sample", "alpha", "sigma", "weight")]
    half_noise = noise.to(dtype)
    for given in (True, False):
        used = half_noise.double() if given else noise
        exact = formula(*[t.double() for t in operands], used, prediction_type)
        source = {"noise": half_noise} if given else {"sample_ids": x["sample_ids"], "key": x["key"], "role": 2}
        loss, grad = denoising_loss(*operands[:4], weight=x["weight"], prediction_type=prediction_type, **source)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert loss.dtype == wide
        assert loss.dim() == 0
        torch.testing.assert_close(loss, exact[0].to(wide))
        if dtype.itemsize == 2:
            in_half = formula(*[t.to(dtype) for t in operands], half_noise, prediction_type)
            assert_within_twice(grad, in_half[1], exact[1])
        else:
            torch.testing.assert_close(grad, exact[1].to(dtype))


def test_strides_do_not_matter(device: str) -> None:
    x = inputs((2, 4, 6, 6), torch.float32, device)
    address = {"sample_ids": x["sample_ids"], "key": x["key"], "prediction_type": "v_prediction"}
    expected = denoising_loss(x["prediction"], x["sample"], x["alpha"], x["sigma"], **address)
    channels_last = x["prediction"].to(memory_format=torch.channels_last)
    sliced = torch.stack((x["sample"], x["sample"]), dim=-1)[..., 1]
    result = denoising_loss(channels_last, sliced, x["alpha"], x["sigma"], **address)
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(result.grad, expected.grad)
    assert result.grad.is_contiguous()


def test_same_bits_from_run_to_run(device: str) -> None:
    x = inputs((5, 4, 17, 17), torch.float32, device)
    arguments = [x[name] for name in ("prediction", "sample", "alpha", "sigma")]
    results = [denoising_loss(*arguments, sample_ids=x["sample_ids"], key=x["key"]) for _ in range(3)]
    for result in results[1:]:
        assert torch.equal(result.loss, results[0].loss)
        assert torch.equal(result.grad, results[0].grad)


def test_default_weight_is_the_mean(device: str) -> None:
    x = inputs((4, 3, 5), torch.float32, device)
    noise = torch.randn_like(x["sample"])
    loss, _ = denoising_loss(x["prediction"], x["sample"], x["alpha"], x["sigma"], noise=noise)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(x["prediction"], noise))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_gradcheck(device: str, prediction_type: str) -> None:
    x = inputs((2, 5), torch.float64, device)
    prediction = x["prediction"].requires_grad_()

    def loss(tensor: Tensor) -> Tensor:
        return denoising_loss(
            tensor,
            x["sample"],
            x["alpha"],
            x["sigma"],
            prediction_type=prediction_type,
            sample_ids=x["sample_ids"],
            key=x["key"],
        ).loss

    assert torch.autograd.gradcheck(loss, (prediction,))


def test_grad_output_scales_and_grad_is_a_constant(device: str) -> None:
    x = inputs((2, 5), torch.bfloat16, device)
    prediction = x["prediction"].requires_grad_()
    result = denoising_loss(prediction, x["sample"], x["alpha"], x["sigma"], sample_ids=x["sample_ids"], key=x["key"])
    assert result.loss.requires_grad
    assert not result.grad.requires_grad
    (3.0 * result.loss).backward()
    torch.testing.assert_close(prediction.grad, 3.0 * result.grad)


def test_sample_prediction_needs_no_noise(device: str) -> None:
    x = inputs((2, 5), torch.float32, device)
    loss, _ = denoising_loss(x["prediction"], x["sample"], x["alpha"], x["sigma"], prediction_type="sample")
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(x["prediction"], x["sample"]))


def test_more_than_int32_elements() -> None:
    prediction = torch.empty(3, 2**31 + 1, device="meta")
    ids, key, vector = torch.empty(3, dtype=torch.int64), torch.empty(2, dtype=torch.int64), torch.empty(3)
    ids, key, vector = (tensor.to("meta") for tensor in (ids, key, vector))
    loss, grad = denoising_loss(prediction, prediction, vector, vector, sample_ids=ids, key=key)
    assert loss.shape == ()
    assert grad.shape == prediction.shape


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device: str, requires_grad: bool) -> None:
    ids, key = torch.tensor([3, 4], device=device), torch.tensor([1, 2], device=device)
    vectors = torch.rand(3, 2, device=device).unbind()
    sample, strided = torch.randn(2, 3, 5, device=device), torch.randn(2, 5, 3, device=device).transpose(1, 2)
    for x, other, target in (
        (sample.clone(), strided, (sample, None, None, 0, "v_prediction")),
        (strided.clone(), sample, (None, ids, key, 1, "epsilon")),
    ):
        arguments = (x.requires_grad_(requires_grad), other, *vectors, *target)
        torch.library.opcheck(torch.ops.erasediff.denoising_loss.default, arguments)


def test_bad_arguments() -> None:
    x = inputs((2, 5), torch.float32, "cpu")
    good = [x["prediction"], x["sample"], x["alpha"], x["sigma"]]
    with pytest.raises(ValueError, match="prediction_type"):
        denoising_loss(*good, prediction_type="eps", noise=x["sample"])
    with pytest.raises(ValueError, match="neither"):
        denoising_loss(*good)
    with pytest.raises(ValueError, match="both"):
        denoising_loss(*good, noise=x["sample"], sample_ids=x["sample_ids"], key=x["key"])
    with pytest.raises(ValueError, match="shape"):
        denoising_loss(x["prediction"], x["sample"][:1], x["alpha"], x["sigma"], noise=x["sample"])
    with pytest.raises(ValueError, match="convert one"):
        denoising_loss(x["prediction"], x["sample"].half(), x["alpha"], x["sigma"], noise=x["sample"])
    with pytest.raises(ValueError, match="weight"):
        denoising_loss(*good, noise=x["sample"], weight=torch.ones(3))
    with pytest.raises(ValueError, match="sigma"):
        denoising_loss(x["prediction"], x["sample"], x["alpha"], x["sigma"].int(), noise=x["sample"])

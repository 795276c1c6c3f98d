import pytest
import torch

from erasediff_kernels import add_noise, philox_noise

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(0, 3), (2, 0), (1, 1), (3,), (3, 5, 7), (2, 4, 9, 9)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    batch = shape[0]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sample = torch.randn(shape, device=device).to(dtype)
    alpha, sigma = torch.rand(2, batch, device=device, dtype=wide)
    ids = torch.randint(0, 2**56, (batch,), device=device)
    return sample, alpha, sigma, ids, torch.tensor([3, 4], device=device)


def column(vector: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return vector.double().view(-1, *(1,) * (like.dim() - 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(device: str, shape: tuple[int, ...], dtype: torch.dtype, assert_within_twice) -> None:
    sample, alpha, sigma, ids, key = inputs(shape, dtype, device)
    noise = philox_noise(ids, key, 1, shape[1:], dtype=torch.float64)
    exact = column(alpha, sample) * sample.double() + column(sigma, sample) * noise
    drawn = add_noise(sample, alpha, sigma, sample_ids=ids, key=key, role=1)
    given = add_noise(sample, alpha, sigma, noise=noise.to(dtype))
    exact_given = column(alpha, sample) * sample.double() + column(sigma, sample) * noise.to(dtype).double()
    if dtype.itemsize == 2:
        torch_given = column(alpha, sample).to(dtype) * sample + column(sigma, sample).to(dtype) * noise.to(dtype)
        assert_within_twice(drawn, torch_given, exact)
        assert_within_twice(given, torch_given, exact_given)
    else:
        torch.testing.assert_close(drawn, exact.to(dtype))
        torch.testing.assert_close(given, exact_given.to(dtype))


def test_strides_do_not_matter(device: str) -> None:
    sample, alpha, sigma, ids, key = inputs((2, 4, 6, 6), torch.float32, device)
    expected = add_noise(sample, alpha, sigma, sample_ids=ids, key=key)
    views = (
        sample.to(memory_format=torch.channels_last),
        sample.transpose(1, 3).contiguous().transpose(1, 3),
        torch.stack((sample, sample), dim=-1)[..., 0],
    )
    for view in views:
        assert not view.is_contiguous()
        result = add_noise(view, alpha, sigma, sample_ids=ids, key=key)
        assert result.is_contiguous()
        assert torch.equal(result, expected)


def test_gradcheck(device: str) -> None:
    sample, alpha, sigma, ids, key = inputs((2, 5), torch.float64, device)
    noise = torch.randn_like(sample)
    leaves = [tensor.requires_grad_() for tensor in (sample, alpha, sigma, noise)]
    assert torch.autograd.gradcheck(lambda x, a, s, n: add_noise(x, a, s, noise=n), leaves)
    assert torch.autograd.gradcheck(lambda x, a, s: add_noise(x, a, s, sample_ids=ids, key=key), leaves[:3])


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device: str, requires_grad: bool) -> None:
    ids, key = torch.tensor([3, 4], device=device), torch.tensor([1, 2], device=device)
    alpha, sigma = torch.rand(2, 2, device=device)
    sample, strided = torch.randn(2, 3, 5, device=device), torch.randn(2, 5, 3, device=device).transpose(1, 2)
    for x, address in ((sample.clone(), (sample, None, None, 0)), (strided.clone(), (None, ids, key, 1))):
        torch.library.opcheck(
            torch.ops.erasediff.add_noise.default, (x.requires_grad_(requires_grad), alpha, sigma, *address)
        )


def test_bad_arguments() -> None:
    sample, alpha, sigma, ids, key = inputs((2, 5), torch.float32, "cpu")
    with pytest.raises(ValueError, match="neither"):
        add_noise(sample, alpha, sigma)
    with pytest.raises(ValueError, match="neither"):
        add_noise(sample, alpha, sigma, sample_ids=ids)
    with pytest.raises(ValueError, match="both"):
        add_noise(sample, alpha, sigma, noise=sample, sample_ids=ids, key=key)
    with pytest.raises(ValueError, match="shape"):
        add_noise(sample, alpha, sigma, noise=sample[:, :4])
    with pytest.raises(ValueError, match="alpha"):
        add_noise(sample, alpha[:1], sigma, noise=sample)
    with pytest.raises(ValueError, match="sample_ids"):
        add_noise(sample, alpha, sigma, sample_ids=ids[:1], key=key)
    with pytest.raises(ValueError, match="dtype"):
        add_noise(sample.int(), alpha, sigma, noise=sample)
    with pytest.raises(ValueError, match="0-D"):
        add_noise(sample.sum(), alpha, sigma, noise=sample)

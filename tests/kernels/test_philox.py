"""The noise: published vectors, statistics, and the same bits in every implementation."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from erasediff_kernels import philox_bits, philox_noise, use_backend
from erasediff_kernels.reference import philox

ALL_ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # Random123, kat_vectors, philox4x32 with 10 rounds
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
GOLDEN = ["0x1.fb765e0000000p-1", "-0x1.d96d660000000p-1", "-0x1.3c37440000000p-1", "-0x1.eda3580000000p-2"]
IDS = [0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**56 - 1]
SEED, STEP = 0x0123456789ABCDEF, 12345


def address(device: str, ids: list[int] = IDS) -> tuple[Tensor, Tensor]:
    return torch.tensor(ids, dtype=torch.int64, device=device), torch.tensor([SEED, STEP], device=device)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    def words(values: tuple[int, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.tensor(value) for value in values)

    assert tuple(int(word) for word in philox.philox4x32(words(counter), words(key))) == expected


def test_first_known_answer_through_the_operator(device: str) -> None:
    ids, key = torch.tensor([0], device=device), torch.tensor([0, 0], device=device)
    assert philox_bits(ids, key, 0, 4).tolist() == [list(KNOWN_ANSWERS[0][2])]


def test_address_fields(device: str) -> None:
    """Word e of a sample is the published block function at the documented counter and key."""
    ids, key = address(device)
    role, count = 0xA5, 11
    bits = philox_bits(ids, key, role, count)
    for row, sample in enumerate(IDS):
        for block in range(3):
            counter = (block, sample & ALL_ONES, STEP, role << 24 | (sample >> 32) & 0xFFFFFF)
            expected = philox.philox4x32(
                tuple(map(torch.tensor, counter)), (torch.tensor(SEED & ALL_ONES), torch.tensor(SEED >> 32))
            )
            got = bits[row, 4 * block : 4 * block + 4].tolist()
            assert got == [int(word) for word in expected][: len(got)]


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2,), (3,), (5, 7), (4, 8, 8), (1023,), (4097,)], ids=str)
def test_same_bits_as_reference(device: str, shape: tuple[int, ...], distribution: str) -> None:
    ids, key = address(device, IDS if math.prod(shape) < 1000 else IDS[-2:])
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        noise = philox_noise(ids, key, 3, shape, distribution, dtype)
        with use_backend("reference"):
            expected = philox_noise(ids.cpu(), key.cpu(), 3, shape, distribution, dtype)
        assert noise.dtype == dtype
        assert noise.is_contiguous()
        assert torch.equal(noise.cpu(), expected)


def test_no_samples(device: str) -> None:
    ids, key = address(device, [])
    assert philox_bits(ids, key, 0, 8).shape == (0, 8)
    assert philox_noise(ids, key, 0, (3, 2)).shape == (0, 3, 2)


def test_value_depends_on_the_address_alone(device: str) -> None:
    ids, key = address(device)
    whole = philox_noise(ids, key, 1, (6, 6))
    assert torch.equal(philox_noise(ids[[4, 2]], key, 1, (6, 6)), whole[[4, 2]])
    assert torch.equal(philox_noise(ids, key, 1, (36,)), whole.flatten(1))
    assert torch.equal(philox_noise(ids, key, 1, (9, 2)).flatten(1), whole.flatten(1)[:, :18])
    assert torch.equal(philox_noise(ids.repeat_interleave(2)[::2], key, 1, (6, 6)), whole)
    for other in (philox_noise(ids, key + 1, 1, (6, 6)), philox_noise(ids, key, 2, (6, 6))):
        assert not (other == whole).any()


def test_negative_seed_and_step_are_bit_patterns(device: str) -> None:
    ids = torch.tensor([-1], device=device)
    key = torch.tensor([-1, -1], device=device)
    counter = (0, ALL_ONES, ALL_ONES, 255 << 24 | 0xFFFFFF)
    expected = philox.philox4x32(tuple(map(torch.tensor, counter)), (torch.tensor(ALL_ONES), torch.tensor(ALL_ONES)))
    assert philox_bits(ids, key, 255, 4)[0].tolist() == [int(word) for word in expected]


def test_blocks_beyond_int32() -> None:
    """Element 2^33 of a sample: block 2^31, which needs an unsigned or 64-bit counter."""
    ids, key = torch.tensor([5]), torch.tensor([1, 2])
    expected = philox.philox4x32(tuple(map(torch.tensor, (2**31, 5, 2, 0))), (torch.tensor(1), torch.tensor(0)))
    words = philox.words(ids, key, 0, 4, first_element=2**33)
    assert words[0].tolist() == [int(word) for word in expected]


def test_normal_against_fp64() -> None:
    words = torch.cat((torch.randint(0, 2**32, (1 << 20,)), torch.arange(4096), 2**32 - 1 - torch.arange(4096)))
    word = torch.stack((words, words.flip(0)), dim=-1)
    exact_radius = (-2.0 * ((word[:, 0].float() * 2.0**-32 + 2.0**-33).double()).log()).sqrt()
    angle = 2.0 * math.pi * (word[:, 1] >> 8).double() * 2.0**-24
    exact = torch.stack((exact_radius * angle.cos(), exact_radius * angle.sin()), dim=-1)
    error = (philox.normal(word).double() - exact).abs()
    # pi/2 is not exact in the fp64 reference either, hence the tiny absolute term at the zeros of sine and cosine.
    assert (error <= 1e-6 * exact.abs() + 1e-15).all()
    assert (error <= 4.0 * 2.0**-24 * exact.abs() + 1e-15).double().mean() > 0.999


def test_normal_is_the_documented_sequence_of_ieee_operations() -> None:
    """numpy rounds each fp32 operation on its own; torch must do the same, whatever vector library it was built on."""

    def horner(x: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
        y = np.full_like(x, coefficients[0])
        for coefficient in coefficients[1:]:
            y = y * x + np.float32(coefficient)
        return y

    half, two = np.float32(0.5), np.float32(-2.0)
    a, b = torch.randint(0, 2**32, (2, 1 << 16)).numpy()
    u = a.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    bits = u.view(np.int32)
    exponent = (bits - np.int32(philox.SQRT_HALF_BITS)) >> 23
    f = (bits - (exponent << 23)).view(np.float32) - np.float32(1.0)
    k, z = exponent.astype(np.float32), f * f
    y = f + ((horner(f, philox.LN_POLYNOMIAL) * f * z + k * np.float32(philox.LN2_LOW)) - z * half)
    radius = np.sqrt((y + k * np.float32(philox.LN2_HIGH)) * two)
    turn = b >> 8
    quadrant = (turn + (1 << 21)) >> 22
    x = (turn - (quadrant << 22)).astype(np.float32) * np.float32(2.0**-22)
    z = x * x
    sine = horner(z, philox.SIN_POLYNOMIAL) * x
    cosine = horner(z, philox.COS_POLYNOMIAL) * z + np.float32(1.0)
    choices = [quadrant % 4 == q for q in range(4)]
    expected = np.stack(
        (
            radius * np.select(choices, [cosine, -sine, -cosine, sine]),
            radius * np.select(choices, [sine, cosine, -sine, -cosine]),
        ),
        axis=-1,
    )
    assert np.array_equal(philox.normal(torch.from_numpy(np.stack((a, b), axis=-1))).numpy(), expected)


def test_golden_values(device: str) -> None:
    noise = philox_noise(torch.tensor([0], device=device), torch.tensor([0, 0], device=device), 0, (4,))
    assert [value.hex() for value in noise[0].tolist()] == GOLDEN


def test_uniform_grid() -> None:
    words = torch.tensor([0, 255, 256, 2**32 - 1])
    assert philox.uniform(words).tolist() == [0.0, 0.0, 2.0**-24, 1.0 - 2.0**-24]


def kolmogorov_distance(values: Tensor, cdf: Tensor) -> float:
    grid = torch.arange(1, values.numel() + 1, dtype=torch.float64) / values.numel()
    return float(torch.maximum((cdf - grid).abs(), (cdf - grid + 1.0 / values.numel()).abs()).max())


def test_distributions() -> None:
    n = 1 << 20
    ids, key = torch.arange(64), torch.tensor([9, 1])
    critical = 1.95 / math.sqrt(n)  # level 0.001
    normal = philox_noise(ids, key, 0, (n // 64,)).flatten().double().sort().values
    assert abs(normal.mean()) < 5.0 / math.sqrt(n)
    assert abs(normal.var() - 1.0) < 5.0 * math.sqrt(2.0 / n)
    assert kolmogorov_distance(normal, torch.special.ndtr(normal)) < critical
    uniform = philox_noise(ids, key, 0, (n // 64,), "uniform").flatten().double().sort().values
    assert abs(uniform.mean() - 0.5) < 5.0 * math.sqrt(1.0 / 12.0 / n)
    assert kolmogorov_distance(uniform, uniform) < critical
    assert uniform.min() >= 0.0
    assert uniform.max() < 1.0


def test_neighbours_are_uncorrelated() -> None:
    noise = philox_noise(torch.arange(512), torch.tensor([0, 0]), 0, (512,)).double()
    bound = 5.0 / math.sqrt(noise.numel())
    for other in (noise.roll(1, 0), noise.roll(1, 1), noise.roll(2, 1), noise.roll(4, 1)):
        assert abs((noise * other).mean()) < bound


def test_opcheck(device: str) -> None:
    ids, key = torch.tensor([3, 4], device=device), torch.tensor([1, 2], device=device)
    torch.library.opcheck(torch.ops.erasediff.philox_bits.default, (ids, key, 1, 7))
    for arguments in ([3, 5], "normal", torch.float32), ([3], "uniform", torch.bfloat16):
        torch.library.opcheck(torch.ops.erasediff.philox_noise.default, (ids, key, 1, *arguments))


def test_bad_arguments() -> None:
    ids, key = address("cpu")
    with pytest.raises(ValueError, match="sample_ids"):
        philox_bits(ids.int(), key, 0, 4)
    with pytest.raises(ValueError, match="sample_ids"):
        philox_bits(ids[None], key, 0, 4)
    with pytest.raises(ValueError, match="key"):
        philox_bits(ids, key[:1], 0, 4)
    with pytest.raises(ValueError, match="role"):
        philox_bits(ids, key, 256, 4)
    with pytest.raises(ValueError, match="words"):
        philox_bits(ids, key, 0, -1)
    with pytest.raises(ValueError, match="distribution"):
        philox_noise(ids, key, 0, (4,), "cauchy")
    with pytest.raises(ValueError, match="dtype"):
        philox_noise(ids, key, 0, (4,), dtype=torch.int32)

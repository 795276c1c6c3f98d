"""Philox4x32-10 noise (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and its fp32 transforms.

Noise is addressed, not stored: a word is a pure function of (seed, step, role, sample id, element), so every rank,
device and implementation draws the same bits for the same sample.

    key      k0 = seed[0:32]         k1 = seed[32:64]
    counter  c0 = element // 4       c1 = sample_id[0:32]    c2 = step[0:32]    c3 = role[0:8] << 24 | sample_id[32:56]

Element e of a sample takes word e % 4 of block e // 4.

The normal is bit-exact as well, not only the words. Its logarithm, sine and cosine are polynomials in which each +, -,
* and sqrt is rounded to fp32 on its own. The order of operations below is normative: no FMA contraction, no
reassociation and no libm in any implementation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
MASK32 = 0xFFFFFFFF

# ln(1 + f) = f - f^2/2 + f^3 P(f) for 1 + f in [sqrt(1/2), sqrt(2)); minimax in relative error, highest power first.
LN_POLYNOMIAL = (
    -0.0763694048,
    0.127624854,
    -0.131595507,
    0.142015398,
    -0.166234106,
    0.200012431,
    -0.250008196,
    0.333333313,
)
LN2_HIGH = 0.693359375  # 355 / 512: its product with any exponent that occurs is exact
LN2_LOW = -2.12194442e-4
SQRT_HALF_BITS = 0x3F3504F3

# sin(pi/2 y) = y S(y^2) and cos(pi/2 y) = 1 + y^2 C(y^2) for y in [-1/2, 1/2]; highest power first.
SIN_POLYNOMIAL = (-0.00468387362, 0.07971178, -0.645966589, 1.57079637)
COS_POLYNOMIAL = (0.000894486264, -0.0208555963, 0.253668547, -1.23370051)

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Ten rounds of Philox4x32. Words are int64 tensors with values in [0, 2^32), broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The 64-bit product may wrap into the sign bit: its bits are still right, and the masks drop the sign.
        product0, product1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0 = (product1 >> 32) & MASK32 ^ c1 ^ k0
        c1 = product1 & MASK32
        c2 = (product0 >> 32) & MASK32 ^ c3 ^ k1
        c3 = product0 & MASK32
        k0, k1 = (k0 + WEYL[0]) & MASK32, (k1 + WEYL[1]) & MASK32
    return c0, c1, c2, c3


def words(sample_ids: Tensor, key: Tensor, role: int, count: int, *, first_element: int = 0) -> Tensor:
    """The words of elements first_element .. first_element + count - 1 of each sample: int64 [B, count].

    `sample_ids` is int64 [B], `key` int64 [2] = (seed, step). `first_element` must be a multiple of 4.
    """
    first_block = first_element // 4
    block = torch.arange(first_block, first_block + (count + 3) // 4, device=sample_ids.device)
    sample = sample_ids[:, None]
    seed, step = key[0], key[1]
    counter = (
        block & MASK32,
        sample & MASK32,
        step & MASK32,
        (role & 0xFF) << 24 | (sample >> 32) & 0xFFFFFF,
    )
    lanes = philox4x32(counter, (seed & MASK32, (seed >> 32) & MASK32))
    return torch.stack(lanes, dim=-1).flatten(1)[:, :count]


def uniform(word: Tensor) -> Tensor:
    """U[0, 1) in fp32, on the grid of 2^-24: exact."""
    return (word >> 8).float() * 2.0**-24


def normal(word: Tensor) -> Tensor:
    """N(0, 1) in fp32 by Box-Muller on the pairs of words (0, 1), (2, 3), ...; `word` is [..., even], so is the result.

    With a = words of even elements and b = words of odd elements:
        u = fp32(a) 2^-32 + 2^-33,  radius = sqrt(-2 ln u),  angle = 2 pi (b >> 8) 2^-24
        even lane = radius cos(angle),  odd lane = radius sin(angle)
    """
    a, b = word[..., 0::2], word[..., 1::2]
    u = a.float() * 2.0**-32 + 2.0**-33
    radius = sqrt(ln(u) * -2.0)
    cosine, sine = cos_sin_turn(b >> 8)
    return torch.stack((radius * cosine, radius * sine), dim=-1).flatten(-2)


def horner(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """((c0 x + c1) x + c2) ...: each product and each sum rounded on its own."""
    y = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        y = y * x + coefficient
    return y


def sqrt(x: Tensor) -> Tensor:
    """Correctly rounded fp32 square root. torch's own is not on the CPU, where a vector library may be an ulp off; in
    fp64 an ulp is too little to move the rounding to fp32."""
    return x.double().sqrt().float()


def ln(u: Tensor) -> Tensor:
    """Natural logarithm of fp32 u in [2^-33, 1]."""
    bits = u.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23  # arithmetic shift: u = m 2^exponent with m in [sqrt(1/2), sqrt(2))
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    k = exponent.float()
    z = f * f
    y = horner(f, LN_POLYNOMIAL) * f * z
    y = y + k * LN2_LOW
    y = y - z * 0.5
    y = f + y
    return y + k * LN2_HIGH


def cos_sin_turn(turn: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2 pi turn / 2^24 for integers `turn` in [0, 2^24); the range reduction is exact."""
    quadrant = (turn + (1 << 21)) >> 22  # the nearest quarter turn, 0 .. 4
    y = (turn - (quadrant << 22)).float() * 2.0**-22
    z = y * y
    sine = horner(z, SIN_POLYNOMIAL) * y
    cosine = horner(z, COS_POLYNOMIAL) * z + 1.0
    swap = quadrant & 1 == 1
    cos_turn = torch.where(swap, sine, cosine)
    sin_turn = torch.where(swap, cosine, sine)
    cos_turn = torch.where((quadrant + 1) & 2 == 2, -cos_turn, cos_turn)
    sin_turn = torch.where(quadrant & 2 == 2, -sin_turn, sin_turn)
    return cos_turn, sin_turn


def noise(
    sample_ids: Tensor,
    key: Tensor,
    role: int,
    numel: int,
    distribution: str,
    *,
    first_element: int = 0,
) -> Tensor:
    """fp32 [B, numel] of "normal" or "uniform" noise, from element `first_element` (a multiple of 4) on."""
    padded = words(sample_ids, key, role, (numel + 1) // 2 * 2, first_element=first_element)
    draw = normal if distribution == "normal" else uniform
    return draw(padded)[:, :numel]

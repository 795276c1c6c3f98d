"""NaN and infinity are found in every dtype, and what is large but finite is let through."""

import pytest
import torch

from erasediff.errors import UserError
from erasediff.utils.finite import all_finite, finite_weight, first_not_finite, first_row_not_finite

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_nan_anywhere_is_found_in_every_dtype(dtype: torch.dtype) -> None:
    values = torch.ones(5, 7)
    assert all_finite(values.to(dtype))
    values[3, 2] = float("nan")
    assert not all_finite(values.to(dtype))
    assert not all_finite(values.to(dtype).T)


@pytest.mark.parametrize("infinity", [float("inf"), -float("inf")])
def test_infinity_is_found_and_large_numbers_are_not_infinity(infinity: float) -> None:
    # Their sum and their squares would overflow.
    large = torch.full((4,), 3e38)
    assert all_finite(large)
    assert all_finite(torch.full((4,), 60000.0, dtype=torch.float16))
    large[1] = infinity
    assert not all_finite(large)


def test_integers_and_nothing_are_finite() -> None:
    assert all_finite(torch.arange(3))
    assert all_finite(torch.empty(0))
    assert first_not_finite([]) is None


def test_the_first_name_is_told() -> None:
    broken = torch.tensor([float("nan")])
    assert first_not_finite([("a", torch.ones(2)), ("b", torch.arange(2)), ("c", broken), ("d", broken)]) == "c"
    with pytest.raises(UserError, match=r"The vae of sd has .* not finite: conv_in holds NaN or infinity; give"):
        finite_weight(broken, "vae of sd", "conv_in")


def test_the_first_row_of_any_tensor_is_told() -> None:
    pooled, tokens = torch.ones(4, 3), torch.ones(4, 2, 3)
    rows = {"pooled": pooled, "tokens": tokens, "sizes": torch.ones(4, 6, dtype=torch.int64)}
    assert first_row_not_finite(rows) is None
    pooled[3, 0] = float("nan")
    tokens[2, 1, 1] = float("inf")
    assert first_row_not_finite(rows) == 2
    assert first_row_not_finite({}) is None

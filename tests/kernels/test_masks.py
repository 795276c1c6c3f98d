import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from erasediff_kernels import pack_mask, unpack_mask


@given(st.lists(st.booleans(), max_size=70))
def test_round_trip(bits: list[bool]) -> None:
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack_mask(mask)
    assert packed.shape == ((len(bits) + 7) // 8,)
    assert torch.equal(unpack_mask(packed, len(bits)), mask)


def test_bit_order() -> None:
    mask = torch.zeros(11, dtype=torch.bool)
    mask[[0, 3, 8, 10]] = True
    assert pack_mask(mask).tolist() == [0b0000_1001, 0b0000_0101]


def test_shapes_and_layouts() -> None:
    mask = torch.rand(2, 3, 4, 5) < 0.5
    assert torch.equal(unpack_mask(pack_mask(mask), (2, 3, 4, 5)), mask)
    param = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    packed = pack_mask(param > 0.0)
    assert torch.equal(unpack_mask(packed, param), param > 0.0)
    assert unpack_mask(packed, param).stride() == param.stride()
    assert torch.equal(unpack_mask(packed, param.numel()), param.permute(0, 2, 3, 1).flatten() > 0.0)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="bool"):
        pack_mask(torch.ones(3))
    with pytest.raises(ValueError, match="contiguous"):
        pack_mask(torch.ones(6, dtype=torch.bool)[::2])
    with pytest.raises(ValueError, match="9 elements"):
        unpack_mask(torch.ones(1, dtype=torch.uint8), 9)

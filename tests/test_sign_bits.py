"""Signs as bits: round trips of any size, the layout of a byte, and sums that never unpack."""

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from stompp_hf.method.mixing import hard
from stompp_hf.method.sign_bits import SignBits, count_ones, pack_signs, unpack_signs

sizes = st.lists(st.integers(0, 3), max_size=2).flatmap(lambda lead: st.integers(0, 40).map(lambda n: (*lead, n)))
dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])


def numbers(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal, with zeros of both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(shape, generator=generator)
    zero = torch.rand(shape, generator=generator) < 0.2
    return torch.where(zero, torch.copysign(torch.zeros_like(u), u), u).to(dtype)


@given(sizes, st.integers(0, 9), dtypes)
def test_round_trip(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> None:
    u = numbers(shape, seed, dtype)
    bits = pack_signs(u)
    assert bits.dtype == torch.uint8 and bits.shape == (*shape[:-1], -(-shape[-1] // 8))
    assert pack_signs(u.to("meta")).shape == bits.shape and pack_signs(u.to("meta")).is_meta
    back = unpack_signs(bits, shape[-1], dtype)
    assert back.dtype == dtype and back.is_contiguous() and torch.equal(back, hard(u))
    assert torch.equal(count_ones(bits), (u >= 0).sum(-1))
    assert torch.equal(pack_signs(back), bits)


@given(sizes, st.integers(0, 9))
def test_the_layout_is_numpys_little_order_with_zeros_behind(shape: tuple[int, ...], seed: int) -> None:
    u = numbers(shape, seed)
    expected = np.packbits((u >= 0).numpy(), axis=-1, bitorder="little")
    assert np.array_equal(pack_signs(u).numpy(), expected)


def test_zero_is_plus_one() -> None:
    assert pack_signs(torch.tensor([0.0, -0.0, -1e-45, 1e-45])).item() == 0b1011


@pytest.mark.parametrize("shape", [(5, 11), (6, 3, 3, 3), (4, 2, 5), (3, 1, 2, 2, 2)])
@pytest.mark.parametrize("channel_dim", [0, 1])
def test_a_weight_of_any_layout(shape: tuple[int, ...], channel_dim: int) -> None:
    weight = numbers(shape, 0)
    bits = SignBits.of(weight, channel_dim)
    assert bits.bits.shape == (shape[channel_dim], -(-bits.fan_in // 8))
    assert torch.equal(bits.signs(torch.float32), hard(weight)) and bits.signs(torch.float32).is_contiguous()
    assert torch.equal(
        bits.signs(torch.float64, 1, 3), hard(weight).narrow(channel_dim, 1, min(2, shape[channel_dim] - 1)).double()
    )
    assert torch.equal(bits.row_sums(torch.float32), hard(weight).movedim(channel_dim, 0).flatten(1).sum(1))


def test_no_values_are_needed_for_a_shape() -> None:
    bits = SignBits.of(torch.empty(7, 13, device="meta"), 0)
    assert bits.bits.is_meta and bits.bits.shape == (7, 2) and bits.signs(torch.float32).shape == (7, 13)

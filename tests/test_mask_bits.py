"""Masks of weights as bits: what is packed comes back, and is what the draws say."""

import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from stompp_hf import BinaryLinear, StoMPPConfig
from stompp_hf.method.flag_bits import pack_flags
from stompp_hf.method.mask_bits import empty_mask, mask_as, pack_mask, rows_of_mask, unpack_mask
from stompp_hf.method.masks import SoftRefreshMask
from stompp_hf.modules import TRANSITION

quick = settings(max_examples=60, deadline=None)
shapes = st.lists(st.integers(1, 17), min_size=1, max_size=3).map(torch.Size)


def random_mask(shape: torch.Size, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


@quick
@given(shape=shapes, seed=st.integers(0, 99))
def test_bits_are_the_mask(shape: torch.Size, seed: int) -> None:
    """Entry i is bit i % 8 of byte i // 8, bits behind the last are 0, and both ways back give the mask."""
    mask = random_mask(shape, seed)
    bits = pack_mask(mask)
    assert bits.dtype is torch.uint8 and bits.shape == empty_mask(shape, mask.device).shape == (-(-mask.numel() // 8),)
    by_hand = [0] * len(bits)
    for i, one in enumerate(mask.flatten().tolist()):
        by_hand[i // 8] |= one << i % 8
    assert bits.tolist() == by_hand
    flags = pack_flags(mask)[0]
    assert flags is not None and torch.equal(bits, flags)
    back = unpack_mask(bits, shape)
    assert back.dtype is torch.bool and torch.equal(back, mask) and back.is_contiguous()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert torch.equal(mask_as(dtype, bits, shape), mask.to(dtype))


@quick
@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 33),
    ids=st.lists(st.integers(0, 8), min_size=1),
    seed=st.integers(0, 9),
)
def test_rows_of_a_table(rows: int, width: int, ids: list[int], seed: int) -> None:
    """Rows that begin within a byte as well."""
    mask = random_mask(torch.Size((rows, width)), seed)
    named = torch.tensor(ids) % rows
    assert torch.equal(rows_of_mask(pack_mask(mask), mask.shape, named), pack_mask(mask[named]))


def test_rows_where_others_compute() -> None:
    """In a compiled graph, and mapped over indices."""
    for width in (5, 16):
        mask = random_mask(torch.Size((6, width)), 0)
        bits, ids = pack_mask(mask), torch.tensor([[1, 5, 5], [0, 2, 3]])

        def numbers(bits: Tensor, ids: Tensor, width: int = width) -> Tensor:
            rows = rows_of_mask(bits, torch.Size((6, width)), ids)
            return mask_as(torch.float32, rows, torch.Size((*ids.shape, width)))

        expected = mask[ids].float()
        assert torch.equal(torch.compile(numbers, fullgraph=True, backend="aot_eager")(bits, ids), expected)
        assert torch.equal(torch.vmap(lambda own, f=numbers, b=bits: f(b, own))(ids), expected)


@quick
@given(entries=st.integers(1, 300), step=st.integers(0, 50), p=st.sampled_from([0.0, 0.3, 1.0]))
def test_draws_are_written_as_bits(entries: int, step: int, p: float) -> None:
    made = SoftRefreshMask(entries, 0, "layer.weight_mask", 10)
    bits = torch.full((-(-entries // 8),), 255, dtype=torch.uint8)
    assert made.fill(bits, step, p) is bits
    booleans = SoftRefreshMask(entries, 0, "layer.weight_mask", 10).fill(
        torch.empty(entries, dtype=torch.bool), step, p
    )
    assert torch.equal(bits, pack_mask(booleans))


def test_a_layer_holds_bits_and_gives_booleans() -> None:
    layer = BinaryLinear.convert(nn.Linear(7, 5), StoMPPConfig())
    assert layer.weight_mask is None
    layer.enter(TRANSITION, 0.5)
    mask = random_mask(torch.Size((5, 7)), 0)
    layer.weight_mask = mask
    assert layer.weight_mask_bits is not None and layer.weight_mask_bits.nbytes == 5
    assert torch.equal(layer.weight_mask, mask)
    held = [value for value in vars(layer).values() if isinstance(value, Tensor)]
    assert all(value.numel() < layer.weight.numel() for value in held)  # and no booleans beside the bits
    for change in (nn.Module.half, lambda layer: layer.type(torch.float64)):
        change(layer)
        assert layer.weight_mask_bits.dtype is torch.uint8 and torch.equal(layer.weight_mask, mask)
    layer.enter("frozen", 1.0)
    assert layer.weight_mask is None

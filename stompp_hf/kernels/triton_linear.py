"""1-bit linear layers on a GPU, in Triton. Imported only where triton is there.

Two launches: signs of the inputs become words of 32 bits, and the product reads words alone. For few rows it counts
the bits that differ; for more it makes -1 and 1 of them, 8 bits each, for the tensor cores, whose sums of whole numbers
are exact. Sizes of blocks were chosen by reasoning, and not measured.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .kept import derived

FEW_ROWS = 16
"""Tensor cores take no fewer rows."""


@triton.jit
def sign_words(x, threshold, words, M, K, W, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """words[m, w]: the signs of x[m, 32 w ...] - threshold, the first in the lowest bit; behind K they are 0."""
    blocks = tl.cdiv(W, WORDS)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(0) % blocks * WORDS + tl.arange(0, WORDS)
    place = tl.arange(0, 32)
    feature = word[:, None] * 32 + place[None, :]
    there = (row < M)[:, None, None] & (feature < K)[None, :, :]
    numbers = tl.load(x + row[:, None, None] * K + feature[None, :, :], mask=there, other=0.0).to(tl.float32)
    difference = numbers + 0.0  # a difference is -0 only where x is
    if threshold is not None:
        difference -= tl.load(threshold + feature, mask=feature < K, other=0.0)[None, :, :]
    ones = there & (difference.to(tl.int32, bitcast=True) >= 0)
    packed = tl.sum(ones.to(tl.int32) << place[None, None, :], 2)
    tl.store(words + row[:, None] * W + word[None, :], packed, mask=(row < M)[:, None] & (word < W)[None, :])


@triton.jit
def _count_ones(words):
    """In the form that LLVM knows, and turns into one instruction."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _signs(words, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """-1 and 1 as int8, (ROWS, 32 * WORDS)."""
    ones = (words[:, :, None] >> tl.arange(0, 32)[None, None, :].to(tl.uint32)) & 1
    return tl.reshape((ones.to(tl.int32) * 2 - 1).to(tl.int8), (ROWS, 32 * WORDS))


@triton.jit
def product(
    words, weights, scale, shift, y, M, N, K, W, SCALE_STEP: tl.constexpr, SHIFT_STEP: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, WORDS: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """y = scale * z + shift from words (M, W) and weights (N, W); z is K less twice the number of bits that differ."""
    blocks = tl.cdiv(N, CHANNELS)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = (tl.program_id(0) % blocks).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    z = tl.zeros((ROWS, CHANNELS), tl.int32)
    for first in range(0, W, WORDS):
        word = first + tl.arange(0, WORDS)
        a_there, b_there = (row < M)[:, None] & (word < W)[None, :], (channel < N)[:, None] & (word < W)[None, :]
        a = tl.load(words + row[:, None] * W + word[None, :], mask=a_there, other=0).to(tl.uint32, bitcast=True)
        b = tl.load(weights + channel[:, None] * W + word[None, :], mask=b_there, other=0).to(tl.uint32, bitcast=True)
        if COUNTS:
            z -= 2 * tl.sum(_count_ones(a[:, None, :] ^ b[None, :, :]), 2)
        else:
            z = tl.dot(_signs(a, ROWS, WORDS), tl.trans(_signs(b, CHANNELS, WORDS)), z, out_dtype=tl.int32)
    if COUNTS:
        z += K
    else:
        z -= tl.cdiv(W, WORDS) * WORDS * 32 - K  # behind K both operands are -1
    result = z.to(tl.float32)
    if SCALE_STEP is not None:
        result = result * tl.load(scale + channel * SCALE_STEP, mask=channel < N, other=0.0)[None, :]
    if SHIFT_STEP is not None:
        result = result + tl.load(shift + channel * SHIFT_STEP, mask=channel < N, other=0.0)[None, :]
    there = (row < M)[:, None] & (channel < N)[None, :]
    tl.store(y + row[:, None] * N + channel[None, :], result.to(y.dtype.element_ty), mask=there)


def linear(
    x: Tensor, threshold: Tensor | None, bits: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`kernels.linear` on a GPU: the same arguments, and bit for bit what torch gives on that device."""
    features, channels = x.shape[-1], bits.shape[0]
    x, y = x.contiguous(), x.new_empty((*x.shape[:-1], channels), dtype=dtype)
    rows, weights = x.numel() // features, _weight_words(bits)
    W = weights.shape[1]
    words = torch.empty(rows, W, dtype=torch.int32, device=x.device)
    threshold, scale, shift = (None if t is None else t.contiguous() for t in (threshold, scale, shift))
    steps = [None if t is None else int(t.numel() > 1) for t in (scale, shift)]
    blocks = blocks_for(rows)
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(rows, 4) * triton.cdiv(W, 8),)
        sign_words[grid](x, threshold, words, rows, features, W, ROWS=4, WORDS=8)
        grid = (triton.cdiv(rows, blocks["ROWS"]) * triton.cdiv(channels, blocks["CHANNELS"]),)
        # Without fusion: a product and a sum that become one operation round once, and torch's round twice.
        product[grid](
            words, weights, scale, shift, y, rows, channels, features, W, *steps, **blocks, enable_fp_fusion=False
        )
    return y


def blocks_for(rows: int) -> dict[str, Any]:
    """How `product` is cut for a number of rows."""
    if rows < FEW_ROWS:
        return {"ROWS": triton.next_power_of_2(rows), "CHANNELS": 16, "WORDS": 16, "COUNTS": True}
    tall = 64 if rows >= 64 else 16
    return {"ROWS": tall, "CHANNELS": 64, "WORDS": 4, "COUNTS": False}


def _weight_words(bits: Tensor) -> Tensor:
    """The bits as int32 (N, ceil(bytes / 4)): the same memory where rows are whole words, else a copy that is kept."""
    ragged = bits.shape[1] % 4
    if not ragged and bits.is_contiguous() and bits.data_ptr() % 4 == 0 and bits.storage_offset() % 4 == 0:
        return bits.view(torch.int32)
    padded = lambda: F.pad(bits.contiguous(), (0, -bits.shape[1] % 4)).clone().view(torch.int32)  # noqa: E731
    return derived(bits, "words", padded)

"""Two packed layers of which one hands the other bits: between them flows a tensor without numbers.

It has the shape and the dtype that it would have, every entry of it is one and the same NaN, and it carries the bits as
an attribute. What reads it in their place, which no forward pass before did, gets NaN, and not something wrong.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _modules

from .. import kernels
from ..errors import PackingError
from ..functional import hard_above
from ..kernels import Cut, Signs, handed
from .conv import ConvProduct
from .product import LinearProduct

_SIGNS = "stompp_signs"


@dataclass
class Join:
    """What a layer that gives bits knows: who reads them, by which cut, and which modules stand between or around."""

    reader: Any
    cut: Cut
    dtype: torch.dtype
    between: list[nn.Module]
    taken: bool = False

    def is_open(self, layer: Any, x: Tensor) -> bool:
        """Whether nobody wants to see the numbers of this call, and the kernels can be called."""
        return (
            not torch.compiler.is_compiling()
            and kernels.choice().native is not None
            and layer.output_dtype is self.dtype
            and not torch.is_autocast_enabled("cpu")
            and not (x.requires_grad or layer.training)
            and not (_modules._global_forward_hooks or _modules._global_forward_pre_hooks)
            and not any(module._forward_hooks or module._forward_pre_hooks for module in self.between)
        )


def by_bits(layer: Any, x: Tensor) -> Tensor | None:
    """The output of a fused layer that takes bits or gives them; None where it does neither in this call.

    Raises:
        PackingError: the bits are another layer's.
    """
    found, join = getattr(x, _SIGNS, None), layer.__dict__.get("join")
    if found is None and join is None:
        return None
    if found is not None:
        signs, giver = found
        if giver.reader is not layer:
            raise PackingError(
                f"{type(layer).__name__} got the bits of another layer: this model's forward pass is not the one that "
                "fuse_for_inference saw; call it on a batch of that kind, or stompp_hf.unfuse(model)."
            )
        giver.taken = True
    gives = join is not None and join.is_open(layer, x)
    if found is None and not (gives and _fits(layer, x)):
        return None
    source = x if found is None else signs
    affine = (layer.fused_scale, layer.fused_shift)
    first = (source, layer.activation_threshold, layer.weight_bits, *affine, join.cut if gives else layer.output_dtype)
    if isinstance(layer.product, LinearProduct):
        y = handed.linear(*first)
    else:
        product = layer._product_of(x)
        pad = int(layer._pad_level() - layer.activation_offset)
        y = handed.conv(
            *first, layer.weight_shape[2:], product.stride, product.padding, product.dilation, product.groups, pad
        )
    return _carrier(y, join) if isinstance(y, Signs) else y


def _fits(layer: Any, x: Tensor) -> bool:
    """Whether the numbers that enter can be taken by this call; if not, the ordinary one says what is wrong."""
    bits, shape = layer.weight_bits, layer.weight_shape
    if type(x) is not Tensor or not kernels.fits(x, bits, shape.numel() // bits.shape[0]):
        return False
    if isinstance(layer.product, LinearProduct):
        return x.shape[-1] == shape[layer.product.feature_dim]
    product = layer._product_of(x)
    return (
        x.is_contiguous()
        and x.dim() == len(shape)
        and x.shape[1] == shape[1] * product.groups
        and min(kernels.output_size(x.shape[2:], shape[2:], product.stride, product.padding, product.dilation)) > 0
    )


def _carrier(signs: Signs, join: Join) -> Tensor:
    tensor = torch.full((), float("nan"), dtype=join.dtype).expand(signs.shape)
    setattr(tensor, _SIGNS, (signs, join))
    return tensor


def join_of(layer: Any, reader: Any, between: list[nn.Module]) -> Join | None:
    """The join of two fused layers, or None where their bits do not stand for all there is."""
    for each in (layer, reader):
        if each.activation_scale is None or each.fused_scale.dtype != torch.float32 or not each.fused_scale.is_cpu:
            return None
    kinds = {type(layer.product), type(reader.product)}
    if kinds == {ConvProduct} and layer.dims == reader.dims:
        for each in (layer, reader):
            few = each.weight_shape[1] < kernels.calls.FEW_CHANNELS  # summed byte by byte
            if few or each.padding_mode != "zeros" or not handed.whole_words(layer.weight_shape[0], each.groups):
                return None
    elif kinds != {LinearProduct}:
        return None
    dtype, fan_in = layer.output_dtype, layer._bits().fan_in
    if dtype not in kernels.calls.DTYPES or max(fan_in, reader._bits().fan_in) >= kernels.calls.EXACT:
        return None
    count = layer.weight_bits.shape[0]
    cut = cut_of(layer.fused_scale, layer.fused_shift, reader.activation_threshold, dtype, fan_in, count)
    return None if cut is None else Join(reader, cut, dtype, between)


def cut_of(
    scale: Tensor, shift: Tensor | None, threshold: Tensor | None, dtype: torch.dtype, most: int, count: int
) -> Cut | None:
    """Where sign(scale * z + shift - b) changes, for whole numbers z of -most to most, by bisection.

    None where anything is infinite or NaN. Else every step (a product, a sum, a rounding, a difference, each rounded)
    keeps order or turns it round, so that a sign changes at one z at most.

    Args:
        scale, shift: float32, (count,) or (1,); shift None for 0.
        threshold: b, float32 (count,) or None for 0.
        dtype: of scale * z + shift, before b is taken from it.
    """
    values = [value for value in (scale, shift, threshold) if value is not None]
    if not all(bool(value.isfinite().all()) for value in values):
        return None
    turn = torch.where(scale < 0, -1.0, 1.0).expand(count)

    def above(z: Tensor) -> Tensor:
        y = z.float() * turn * scale
        y = (y if shift is None else y + shift).to(dtype).float()
        return hard_above(y, threshold) > 0

    least, end = torch.full((count,), -most), torch.full((count,), most + 1)
    while bool((least < end).any()):
        middle = torch.div(least + end, 2, rounding_mode="floor")
        found = above(middle) & (least < end)
        end = torch.where(found, middle, end)
        least = torch.where(found | (least >= end), least, middle + 1)
    flips = turn < 0
    places = torch.zeros(kernels.calls.words_of(count) * kernels.calls.WORD, dtype=torch.int64)
    places[:count] = flips.long()
    words = (places.view(-1, kernels.calls.WORD) << torch.arange(kernels.calls.WORD)).sum(1)
    words = torch.where(words >= 2**31, words - 2**32, words).int()
    return Cut(torch.where(flips, 1 - least, least).float(), words)

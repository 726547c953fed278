"""Bits for the backward pass: they come back as they were, and a frozen layer keeps nothing else of a binary input."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stompp_hf import BinaryConv2d, BinaryLayer, BinaryLinear, StoMPPConfig, kernels
from stompp_hf.method.flag_bits import pack_flags, unpack_flags, unpack_levels
from stompp_hf.modules import FROZEN

LAYOUTS = {
    "rows": lambda: torch.rand(3, 16) < 0.5,
    "odd": lambda: torch.rand(3, 7) < 0.5,
    "one": lambda: torch.rand(()) < 0.5,
    "none": lambda: torch.rand(0, 8) < 0.5,
    "transposed": lambda: (torch.rand(5, 8) < 0.5).t(),
    "channels last": lambda: (torch.rand(2, 8, 3, 5) < 0.5).contiguous(memory_format=torch.channels_last),
    "expanded": lambda: (torch.rand(8, 1) < 0.5).expand(8, 3),
    "a part": lambda: (torch.rand(9, 8) < 0.5)[1:, 1:],
    "from the middle of a byte": lambda: (torch.rand(17) < 0.5)[1:],
}


@pytest.mark.parametrize("way", [kernels.switched_off, contextlib.nullcontext])
@pytest.mark.parametrize("name", LAYOUTS)
def test_flags_come_back(name: str, way: Any) -> None:
    torch.manual_seed(0)
    flags = LAYOUTS[name]()
    bits, layout = pack_flags(flags)
    assert bits is not None and bits.dtype is torch.uint8 and bits.numel() == -(-flags.numel() // 8)
    found = unpack_flags(bits, layout)
    assert found.dtype is torch.bool and torch.equal(found, flags)
    with way():
        levels = unpack_levels(bits, layout, torch.float32, 1.0)
        assert torch.equal(levels, 2.0 * flags) and levels.stride() == found.stride()
    assert torch.equal(unpack_levels(bits, layout, torch.bfloat16), torch.where(flags, 1.0, -1.0).bfloat16())


def test_what_are_no_flags_stays() -> None:
    numbers = torch.rand(8)
    assert pack_flags(numbers) == (numbers, None) and pack_flags(None) == (None, None)
    assert unpack_flags(numbers, None) is numbers


def kept(layer: BinaryLayer, x: Tensor) -> list[Tensor]:
    """What waits for the backward pass, apart from parameters."""
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    tensors: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    return [t for t in tensors if t.data_ptr() not in own and t.numel() >= x.numel() // 8]


@pytest.mark.parametrize("way", ["torch", "auto"])
@pytest.mark.parametrize("scale", ["channel", "group"])
@pytest.mark.parametrize(("kind", "signs", "windows"), [("ste", 1, 0), ("clipped_ste", 1, 1), ("windowed_ste", 1, 1)])
@pytest.mark.parametrize("dims", [2, 4])
def test_a_frozen_layer_keeps_bits(dims: int, kind: str, signs: int, windows: int, scale: str, way: str) -> None:
    torch.manual_seed(0)
    config = StoMPPConfig(frozen_gradient=kind, activation_clip=1.0, weight_scale=scale)
    plain = nn.Linear(32, 8) if dims == 2 else nn.Conv2d(32, 8, 3)
    layer = (BinaryLinear if dims == 2 else BinaryConv2d).convert(plain, config)
    x = torch.randn((64, 32) if dims == 2 else (4, 32, 8, 8), requires_grad=True)
    layer.calibrate_weight()
    layer.calibrate_activation(layer.product.rows(x.detach()))
    layer.enter(FROZEN, 1.0)
    kernels.use(way)
    try:
        found = kept(layer, x)
    finally:
        kernels.use()
    assert [t.dtype for t in found] == [torch.uint8] * (signs + windows)
    assert sum(t.nbytes for t in found) == (signs + windows) * x.numel() // 8

"""The forward of a fused linear layer whose checks were made before: with one row, Python is most of the time."""

from typing import Any

import torch
from torch import Tensor, get_num_threads, is_autocast_enabled

from .. import kernels
from ..kernels import DTYPES, choice

FEW = 4
"""Rows up to which calls are made in C altogether: it keeps an empty output of the shape seen last."""
SHARED = (
    Tensor, torch.empty_like, get_num_threads, is_autocast_enabled, "cpu",
    "is_cpu", "requires_grad", "dtype", "shape", "is_contiguous", "data_ptr",
)  # fmt: skip
"""What such calls need of torch, in the order of python.c."""


class PreparedLinear:
    """y = scale * (sign(x - b) @ sign(w).T) + shift of a fused layer, or of its real x, straight to compiled C.

    A call returns None where the layer has to go its ordinary way: plain torch, another device, a dtype that C does not
    take, a gradient, autocast, a subclass of Tensor. Addresses are those of the layer's tensors, and are looked up anew
    when one of these is another or lies elsewhere. A copy of this object is None: a copied layer makes one of its own.
    Shapes and dtypes: those of `kernels.linear` and `kernels.real_linear`.
    Source: this library's choice.
    """

    __slots__ = ("addresses", "buffers", "choice", "dtype", "home", "own", "parts", "tensors")

    def __init__(self) -> None:
        self.choice: Any = None  # nothing is looked up yet
        self.parts: tuple[Any, ...] | None = None
        self.own: tuple[Any, ...] | None = None  # of the shape seen last

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __call__(self, layer: Any, x: Tensor) -> Tensor | None:
        known = self.choice is choice() and self.dtype is layer.output_dtype and self.buffers is layer._buffers
        if known and self.own is not None:
            y = self.choice.native.stompp_prepared(SHARED, self.own, x)
            if y is not None:
                return y  # type: ignore[no-any-return]
        if type(x) is not Tensor or not x.is_cpu or x.requires_grad or is_autocast_enabled("cpu"):
            return None
        if not known or self._moved():
            self._look_up(layer)
        taken = DTYPES.get(x.dtype)
        if self.parts is None or taken is None:
            return None
        function, real, given, features, outputs, threshold, *rest = self.parts
        if features == 1 or not x.is_contiguous():
            return None  # what carries bits in place of numbers (`joined`) is one number, spread out
        if x.shape[-1:] != (features,) or x.numel() == 0:
            return None
        rows = x.numel() // features
        y = x.new_empty((*x.shape[:-1], outputs), dtype=self.dtype)
        if rows <= FEW and not (real and taken):
            self._keep(x, torch.empty_like(y), rows)
        threads = get_num_threads()
        if not real:
            status = function(
                x.data_ptr(), taken, threshold, *rest, y.data_ptr(), given, rows, features, outputs, threads
            )
        elif taken == 0:
            status = function(x.data_ptr(), *rest, y.data_ptr(), rows, features, outputs, threads)
        else:
            return None
        return y if status == 0 else None  # the ordinary way says what is wrong

    def _keep(self, x: Tensor, like: Tensor, rows: int) -> None:
        """Prepare for other inputs like this one, where C can take calls from Python."""
        if self.parts is None or not hasattr(self.choice.native, "stompp_prepared"):
            return
        _, real, given, features, outputs, threshold, bits, scale, step, shift, shift_step = self.parts
        rest, sizes = (bits, scale, step, shift, shift_step, 0), (rows, features, outputs, 0)  # 0: filled in by C
        arguments = (0, *rest, *sizes) if real else (0, DTYPES[x.dtype], threshold, *rest, given, *sizes)
        names = ("weight_bits", "fused_scale", "fused_shift", "activation_threshold")
        homes = (self.buffers, self.buffers, self.buffers, self.home)
        every = zip(homes, names, self.tensors, (bits, scale, shift, threshold), strict=True)
        tensors = [part for home, name, tensor, at in every for part in (home, name, tensor, at or 0)]
        self.own = (x.shape, x.dtype, like, real, *tensors, *arguments)

    def _moved(self) -> bool:
        """Whether a tensor of the layer is another one, or elsewhere. Written out: it is part of every call."""
        buffers = self.buffers
        bits, scale, shift, threshold = self.tensors
        at = self.addresses
        return (
            buffers["weight_bits"] is not bits
            or buffers["fused_scale"] is not scale
            or buffers["fused_shift"] is not shift
            or self.home["activation_threshold"] is not threshold
            or bits.data_ptr() != at[0]
            or scale.data_ptr() != at[1]
            or (shift is not None and shift.data_ptr() != at[2])
            or (threshold is not None and threshold.data_ptr() != at[3])
        )

    def _look_up(self, layer: Any) -> None:
        chosen, buffers, dtype = choice(), layer._buffers, layer.output_dtype
        self.buffers = buffers
        self.home = layer._buffers if "activation_threshold" in layer._buffers else layer._parameters
        bits, scale, shift = (buffers[name] for name in ("weight_bits", "fused_scale", "fused_shift"))
        threshold = self.home["activation_threshold"]
        features, outputs = layer.weight_shape[layer.product.feature_dim], bits.shape[0]
        real = layer.activation_scale is None
        self.tensors = bits, scale, shift, threshold
        self.addresses = [None if tensor is None else tensor.data_ptr() for tensor in self.tensors]
        self.dtype, self.own, self.parts = dtype, None, None
        if chosen.native is not None and self._fits(features, outputs, real, dtype):
            steps = (int(scale.numel() > 1), self.addresses[2], int(shift is not None and shift.numel() > 1))
            own = (self.addresses[3], self.addresses[0], self.addresses[1], *steps)
            given = DTYPES[dtype]
            function = chosen.native.stompp_real_linear if real else chosen.native.stompp_linear
            if not real or chosen.native.stompp_has_real():
                self.parts = function, real, given, features, outputs, *own
        self.choice = chosen  # last: another thread may be calling

    def _fits(self, features: int, outputs: int, real: bool, dtype: torch.dtype) -> bool:
        bits, scale, shift, threshold = self.tensors
        return (
            all(tensor is None or (tensor.is_cpu and tensor.is_contiguous()) for tensor in self.tensors)
            and 0 < features < kernels.EXACT
            and (dtype is torch.float32 if real else dtype in DTYPES)
            and kernels.sizes_fit(features, features, threshold, bits, scale, shift)
        )

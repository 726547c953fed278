"""The forward of a packed linear layer whose checks were made before: with one row, Python is most of the time."""

import functools
from typing import Any

import torch
from torch import Tensor, get_num_threads, is_autocast_enabled, is_grad_enabled
from torch.compiler import is_dynamo_compiling

from .. import kernels
from ..integrations.torch import QUESTIONS, VERSION, buffers_of, is_watched, parameters_of
from ..kernels import DTYPES, choice, choosing
from ..method.sign_bits import SignBits

FEW = 4
"""Rows up to which calls are made in C altogether: it keeps an empty output of the shape seen last."""
BINARY, LOOKED_UP, IN_LANES = range(3)
"""What a call takes, in the order of python.c: signs of x, or real x, with sums by look-up or in torch's own order."""
FUNCTIONS = ("stompp_linear", "stompp_real_linear", "stompp_lane_linear")
LEAST = 16
"""Features from which on a few random inputs tell whether sums have the same order."""
SHARED = (
    Tensor, torch.empty_like, get_num_threads, is_autocast_enabled, "cpu",
    "is_cpu", "requires_grad", "dtype", "shape", "is_contiguous", "data_ptr", VERSION, QUESTIONS,
)  # fmt: skip
"""What such calls need, in the order of python.c."""


@functools.lru_cache(maxsize=256)
def sums_alike(product: Any, shape: torch.Size, outputs: int, threads: int, chosen: Any) -> bool:
    """Whether C's sums of one row of real inputs have the order of torch's, so that both round alike: bit for bit.

    A library sums in one order whatever the numbers are, so a few at random tell; they lie in memory in several ways,
    on which it might depend. Fewer features than `LEAST` would tell too little.
    Source: this library's choice.

    Args:
        product: of the layer.
        shape: of the input, (..., K) with one row.
        outputs: of the layer, N.
        threads: of torch.
        chosen: the kernels.
    """
    features = shape[-1]
    if shape.numel() != features or features < LEAST:
        return False
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        weight = [features, outputs] if product.channel_dim else [outputs, features]
        bits = SignBits.of(torch.randn(weight, generator=generator), product.channel_dim)
        signs, one = bits.signs(torch.float32), torch.ones(1)
        rows = (torch.randn(at + features, generator=generator)[at:].reshape(shape) for at in (0, 1, 4, 8))
        return all(torch.equal(kernels.lane_linear(x, bits.bits, one, None), product(x, signs)) for x in rows)


class PreparedLinear:
    """y = scale * (sign(x - b) @ sign(w).T) + shift of a layer, or of its real x, straight to compiled C.

    A call returns None where the layer has to go its ordinary way: plain torch, another device, a dtype that C does not
    take, a gradient, autocast, a subclass of Tensor, anybody who listens (`is_watched`). Addresses are those of
    the layer's tensors, and are looked up anew when one of these is another, lies elsewhere or was changed. A copy of
    this object is None: a copied layer makes one of its own.
    Real inputs: one row at a time, where torch sums as C does (see `sums_alike`); of layers that were fused for
    inference, by look-up.
    Shapes and dtypes: those of `kernels.linear` and `kernels.real_linear`.
    Source: this library's choice.
    """

    __slots__ = ("choice", "dtype", "kinds", "own", "parts", "quick", "tensors")

    def __init__(self) -> None:
        self.choice: Any = None  # nothing is looked up yet
        self.tensors: tuple[tuple[Any, ...], ...] = ()
        self.kinds = DTYPES  # what C calls the numbers of x
        self.parts: tuple[Any, ...] | None = None
        self.own: tuple[Any, ...] | None = None  # of the shape seen last
        self.quick: Any = _not_quick

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __call__(self, layer: Any, x: Tensor) -> Tensor | None:
        if type(x) is not Tensor or not x.is_cpu or x.requires_grad or is_autocast_enabled("cpu") or is_watched():
            return None
        layer.followed()  # the values may be older than the layer's tensors
        if self.choice is not choice() or self.dtype is not layer.output_dtype or self._moved():
            self._look_up(layer)
        taken = self.kinds.get(x.dtype)
        if self.parts is None or taken is None:
            return None
        function, kind, given, features, outputs, threshold, *rest = self.parts
        if x.shape[-1:] != (features,) or x.numel() == 0 or not x.is_contiguous() or x.is_neg():
            return None
        rows, threads = x.numel() // features, get_num_threads()
        if kind and (
            taken or (kind == IN_LANES and not sums_alike(layer.product, x.shape, outputs, threads, choice()))
        ):
            return None
        y = x.new_empty((*x.shape[:-1], outputs), dtype=self.dtype)
        if rows <= FEW:
            self._keep(layer, x, torch.empty_like(y), rows, threads if kind == IN_LANES else 0)
        if kind == BINARY:
            status = function(
                x.data_ptr(), taken, threshold, *rest, y.data_ptr(), given, rows, features, outputs, threads
            )
        else:
            status = function(x.data_ptr(), *rest, y.data_ptr(), rows, features, outputs, threads)
        return y if status == 0 else None  # the ordinary way says what is wrong

    def _keep(self, layer: Any, x: Tensor, like: Tensor, rows: int, threads: int) -> None:
        """Prepare `quick` for other inputs like this one, where C can take calls from Python.

        It looks at everything itself: x, who listens, the layer's dtype, its tensors and those that its values are of,
        and the number of threads where it matters (not 0).
        """
        if self.parts is None or not hasattr(self.choice.native, "stompp_whole_call"):
            return
        _, kind, given, features, outputs, threshold, *rest = self.parts
        arguments = (*rest, 0, rows, features, outputs, threads)  # 0: filled in by C
        arguments = (0, *arguments) if kind else (0, self.kinds[x.dtype], threshold, *rest, 0, given, *arguments[-4:])
        made_of = tuple(
            (home, name, tensor, seen.memory.data_ptr(), seen.version) if seen else (home, name, None, 0, None)
            for home, name, tensor, seen in layer.fused.seen
        )
        of = [(vars(layer), name) for name in ("fused", "observer", "output_dtype")] + [(vars(choosing), "_chosen")]
        alike = tuple((home, name, home.get(name), None, None) for home, name in of)
        self.own = (x.shape, x.dtype, like, kind, (*alike, *self.tensors, *made_of), *arguments)
        self.quick = functools.partial(self.choice.native.stompp_whole_call, SHARED, self.own)

    def _moved(self) -> bool:
        """Whether a tensor of the layer is another one, or elsewhere."""
        return any(
            home.get(name) is not tensor or (tensor is not None and tensor.data_ptr() != at)
            for home, name, tensor, at, _ in self.tensors
        )

    def _look_up(self, layer: Any) -> None:
        chosen, buffers, dtype = choice(), buffers_of(layer), layer.output_dtype
        home = buffers if "activation_threshold" in buffers else parameters_of(layer)
        values = buffers if "fused_scale" in buffers else vars(layer)  # buffers, where they were fused for good
        found = [(buffers, "weight_bits"), (values, "fused_scale"), (values, "fused_shift")]
        cut = buffers.get("fused_cut")
        found.append((home, "activation_threshold") if cut is None else (buffers, "fused_cut"))
        tensors = [place[name] for place, name in found]
        bits, scale, shift, threshold = tensors
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        self.tensors = tuple(
            (*where, tensor, at or 0, None) for where, tensor, at in zip(found, tensors, addresses, strict=True)
        )
        features, outputs = layer.weight_shape[layer.product.feature_dim], bits.shape[0]
        real = layer.activation_scale is None
        self.kinds = DTYPES if cut is None else choosing.CUT_DTYPES
        self.dtype, self.own, self.parts, self.quick = dtype, None, None, _not_quick
        if chosen.native is not None and _fits(bits, scale, shift, threshold, features, real, cut is not None, dtype):
            steps = (int(scale.numel() > 1), addresses[2], int(shift is not None and shift.numel() > 1))
            kind = BINARY if not real else LOOKED_UP if layer.is_for_inference else IN_LANES
            if kind != LOOKED_UP or chosen.native.stompp_has_real():
                own = (addresses[3], *addresses[:2], *steps)
                self.parts = getattr(chosen.native, FUNCTIONS[kind]), kind, DTYPES[dtype], features, outputs, *own
        self.choice = chosen  # last: another thread may be calling


def _not_quick(x: Tensor) -> None:
    """In place of a call in C, where there is none."""


def _fits(
    bits: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    threshold: Tensor | None,
    features: int,
    real: bool,
    cut: bool,
    dtype: torch.dtype,
) -> bool:
    """Whether C can take a layer's tensors; with `cut`, the threshold is what `FollowedActivation` made."""
    return (
        all(t is None or (t.is_cpu and t.is_contiguous()) for t in (bits, scale, shift, threshold))
        and all(t is None or t.dtype is torch.float32 for t in (scale, shift, threshold))
        and 0 < features < choosing.EXACT
        and (dtype is torch.float32 if real else dtype in DTYPES)
        and kernels.sizes_fit(features, features, None if cut else threshold, bits, scale, shift)
        and (not cut or (threshold is not None and threshold.shape == (2, features)))
    )


class StraightForward:
    """The forward of packed linear layers: where no gradient is wanted, in eager mode, straight to compiled C."""

    prepared: PreparedLinear | None = None

    def forward(self, input: Tensor) -> Tensor:
        layer: Any = self
        # The least that is asked each time: `quick` sees whatever else changes, and was made where the rest held.
        if (layer.is_for_inference or not (layer.training or is_grad_enabled())) and not is_dynamo_compiling():
            prepared = self.prepared
            y = None if prepared is None else prepared.quick(input)
            if y is None and layer.observer is None and (layer.is_for_inference or layer.goes_straight()):
                if prepared is None:
                    prepared = self.prepared = PreparedLinear()
                y = prepared(layer, input)
            if y is not None:
                return y  # type: ignore[no-any-return]
        return super().forward(input)  # type: ignore[misc, no-any-return]

"""Which way a product goes: asked by everybody who could call a kernel, and answered here alone.

A kernel is called by address, past torch's dispatcher, and nobody who listens there sees it: a tracer would record an
empty tensor in its place, a counter nothing, and a transformation would lose its values. So a kernel is called only
where nobody listens, with tensors that are nothing but numbers in memory, and without a gradient of torch's own. In all
other cases plain torch gives the same numbers, bit for bit.

The private names of torch that say who listens stand here, and in no other file.
"""

import enum
import functools
import logging
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _dispatch_tls_is_dispatch_key_included as _is_included,  # type: ignore[attr-defined]
    _is_tracing,  # type: ignore[attr-defined]
    _len_torch_dispatch_stack as _dispatch_modes,
    _len_torch_function_stack as _function_modes,
)
from torch._C._functorch import maybe_current_level as _functorch_level
from torch.autograd import forward_ad as _forward_ad
from torch.nn import Parameter
from torch.utils._device import DeviceContext

from ..errors import DerivativeError
from . import gpu
from .native import choice

logger = logging.getLogger(__name__)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What an input of a product, and its output, may be, with the numbers that kernels know them by."""
EXACT = 2**24
"""Sums of fewer signs are exact in float32."""


class Route(enum.Enum):
    """The ways of a product."""

    TORCH = "operations of torch"
    OPERATOR = "an operator of this library in a compiled or exported graph"
    NATIVE = "compiled C, by address"
    TRITON = "Triton, by address"


_has_python_dispatcher = functools.partial(_is_included, torch._C.DispatchKey.PythonDispatcher)
"""Of make_fx before autograd, whose modes are not among the others."""

QUESTIONS: tuple[tuple[Any, str | None, Any], ...] = (
    (_dispatch_modes, None, 0),  # TorchDispatchMode: FlopCounterMode, FakeTensorMode, make_fx
    (_functorch_level, None, None),  # torch.func: vmap, grad, jvp, functionalize
    (_is_tracing, None, False),  # torch.jit.trace, and the older ONNX exporter
    (_function_modes, None, 0),
    (_forward_ad, "_current_level", -1),
    (_has_python_dispatcher, None, False),
)
"""Who may listen: what is called, or whose attribute is read, and the answer where nobody does (python.c asks so)."""


def is_watched() -> bool:
    """Whether anybody listens to torch's operations, or changes them, in this thread and at this moment: `QUESTIONS`.

    For eager code: what is compiled has to ask `torch.compiler.is_compiling` before.
    """
    return (
        _dispatch_modes() != 0
        or _functorch_level() is not None
        or _is_tracing()
        or (_function_modes() != 0 and _has_function_mode())
        or _forward_ad._current_level >= 0
        or _has_python_dispatcher()
    )


def _has_function_mode() -> bool:
    """Whether there is a TorchFunctionMode that is more than a default device."""
    modes: Any = torch.overrides._get_current_function_mode_stack()  # type: ignore[attr-defined]
    return any(type(mode) is not DeviceContext for mode in modes)


def is_eager() -> bool:
    """Whether Python computes, and nothing records or watches what it does: only then may anything be kept."""
    return not torch.compiler.is_compiling() and not is_watched()


def route(
    x: Tensor,
    *others: Tensor | None,
    dtypes: Collection[torch.dtype] = DTYPES,
    fan_in: int = 1,
    triton: bool = False,
) -> Route:
    """The way of a product of these tensors.

    A kernel takes them if nobody listens (see `is_watched`), kernels are switched on, every one is a plain tensor (no
    subclass, no lazy negation) of one device that has kernels, and torch is to record no gradient. While a graph is
    compiled or exported, an operator of this library stands for the kernel.

    Args:
        x: the input, of one of `dtypes`, and not empty.
        others: what else the kernel reads, or what a gradient would be wanted of.
        dtypes: what x may be.
        fan_in: signs that are summed: as many as are exact in float32.
        triton: whether there is a kernel for a GPU.
    """
    if x.dtype not in dtypes or not 0 < fan_in < EXACT:
        return Route.TORCH
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others)):
        return Route.TORCH
    if torch.compiler.is_compiling():
        return Route.OPERATOR if x.is_cpu or (triton and gpu.used_on(x.device)) else Route.TORCH
    if x.is_cpu and choice().native is not None:
        kernel = Route.NATIVE
    elif triton and gpu.used_on(x.device):
        kernel = Route.TRITON
    else:
        return Route.TORCH
    if is_watched() or x.numel() == 0:
        return Route.TORCH
    plain = all(t is None or (type(t) in _PLAIN and t.device == x.device and not t.is_neg()) for t in (x, *others))
    return kernel if plain else Route.TORCH


_PLAIN = (Tensor, Parameter)


def has_tangent(*arguments: Any) -> bool:
    """Whether a forward-mode derivative comes with any of these (torch.func.jvp, torch.autograd.forward_ad)."""
    if torch.compiler.is_compiling() or _forward_ad._current_level < 0:
        return False
    return any(isinstance(t, Tensor) and _forward_ad.unpack_dual(t).tangent is not None for t in arguments)


def apply(function: Any, *arguments: Any) -> Any:
    """`function.apply(*arguments)` of an autograd function, or its forward alone where that cannot be.

    torch.func takes no function of this kind, and a traced graph (torch.jit.trace, the older ONNX exporter) with one in
    it could not be saved: they get the operations of its forward, which pass no surrogate gradient.

    Raises:
        DerivativeError: torch.func or a forward-mode derivative asks for a gradient.
    """
    if torch.compiler.is_compiling() or not is_watched():
        return function.apply(*arguments)
    wanted = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments)
    if has_tangent(*arguments) or (wanted and _functorch_level() is not None):
        raise DerivativeError(
            "a binary layer gives no derivative to torch.func (vmap, grad, jvp and the like) or in forward mode: its "
            "surrogate gradient is one of loss.backward() or torch.autograd.grad. To map a model over inputs without "
            "a gradient, call torch.func.vmap(model)(inputs) under torch.no_grad()."
        )
    if wanted and not _is_tracing():
        return function.apply(*arguments)
    if wanted:
        _say_that_traces_do_not_train()
    with torch.no_grad():
        return function.forward(_NoGradient(len(arguments)), *arguments)


@functools.cache
def _say_that_traces_do_not_train() -> None:
    logger.warning(
        "a traced graph (torch.jit.trace, torch.onnx.export) passes no surrogate gradient through binary layers: use "
        "it for inference, and trace it under torch.no_grad()."
    )


class _NoGradient:
    """What a function's forward is given as its `ctx` where nothing is to be kept for a backward pass."""

    def __init__(self, count: int) -> None:
        self.needs_input_grad = (False,) * count

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass

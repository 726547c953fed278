"""Which kernels are used, and which way a product goes: asked by everybody who could call one, and answered here alone.

A kernel is called by address, past torch's dispatcher, and nobody who listens there sees it: a tracer would record an
empty tensor in its place, a counter nothing, and a transformation would lose its values. So a kernel is called only
where nobody listens, with tensors that are nothing but numbers in memory, and without a gradient of torch's own. In all
other cases plain torch gives the same numbers, bit for bit.
"""

import contextlib
import enum
import functools
import importlib
import logging
import os
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..errors import DerivativeError, KernelError
from ..integrations.torch import constant_when_compiled, functorch_level, has_tangent, is_tracing, is_watched
from . import native
from .native import Choice

logger = logging.getLogger(__name__)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What an input of a product, and its output, may be, with the numbers that kernels know them by."""
CUT_DTYPES = {torch.float32: 3}
"""The same where every feature has two thresholds: TWO_CUTS of kernels.h."""
EXACT = 2**24
"""Sums of fewer signs are exact in float32."""


# ---- what is used ----

_chosen: Choice | None = None


def choice() -> Choice:
    """What is used in this process; decided at the first call, from the environment.

    Raises:
        KernelError: STOMPP_KERNELS=c without the compiled part, or a value that is none.
    """
    return _chosen if _chosen is not None else use()


def use(mode: str | None = None, cpu: str | None = None) -> Choice:
    """Decide anew what is used in this process.

    Args:
        mode: "torch", "c", "triton" or "auto"; None for what STOMPP_KERNELS says.
        cpu: "portable", "avx2", "avx512" or "neon", what may be used at most; None for what STOMPP_KERNELS_CPU says.

    Raises:
        KernelError: "c" without the compiled part, "triton" without Triton, or a value that is none.
    """
    global _chosen
    mode = os.environ.get(native.MODE, "auto") if mode is None else mode
    cpu = os.environ.get(native.LIMIT, "") if cpu is None else cpu
    for name, value, values in ((native.MODE, mode, native.MODES), (native.LIMIT, cpu, native.LIMITS)):
        if value not in values:
            known = ", ".join(word for word in values if word)
            raise KernelError(f"{name} is {value!r}, and must be one of {known}.")
    _chosen = native.choice_of(mode, cpu)
    return _chosen


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    """Inside the block everything computes in plain torch, whatever was decided before."""
    global _chosen
    before, _chosen = _chosen, native.choice_of("torch", "")
    try:
        yield
    finally:
        _chosen = before


GPUS = ("cuda",)
"""Where Triton's kernels run; ROCm's devices are called so too."""


@constant_when_compiled
def triton_version() -> str | None:
    """Triton's version, or None where it cannot be imported; it comes with torch's builds for GPUs."""
    return _version()


@functools.cache
def _version() -> str | None:
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError:
        return None


def used_on_gpu(device: torch.device) -> bool:
    """Whether Triton computes for tensors of a device."""
    return device.type in GPUS and choice().mode != "torch" and triton_version() is not None


def describe() -> str:
    """Lines that say what is used, on a CPU and on a GPU, and why."""
    chosen, path, version = choice(), native.library_path(), triton_version()
    lines = [
        f"kernels       {chosen.used}{' with ' + chosen.instructions if chosen.instructions else ''}",
        f"because       {chosen.reason}",
        f"compiled part {path.name if path else 'none'}",
    ]
    if chosen.used == "c":
        lines.append(f"threads       {'of torch' if native.team() else 'made for each call'}")
    if chosen.mode == "torch":
        on_gpu = f"torch: {native.MODE}=torch"
    elif version is None:
        on_gpu = "torch: triton cannot be imported (it comes with torch's builds for GPUs)"
    elif not torch.cuda.is_available():
        on_gpu = f"nothing: there is no GPU (triton {version} is there)"
    else:
        on_gpu = f"triton: triton {version} is there, for linear layers with binary inputs; the rest in torch"
    return "\n".join([*lines, f"on a GPU      {on_gpu}"])


# ---- which way ----


class Route(enum.Enum):
    """The ways of a product."""

    TORCH = "operations of torch"
    OPERATOR = "an operator of this library in a compiled or exported graph"
    NATIVE = "compiled C, by address"
    TRITON = "Triton, by address"


def is_eager() -> bool:
    """Whether Python computes, and nothing records or watches what it does: only then may anything be kept."""
    return not torch.compiler.is_compiling() and not is_watched()


def is_exported() -> bool:
    """Whether a graph is recorded for other runtimes, which know torch's core operators (Core ATen) and no others."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


def route(
    x: Tensor, *others: Tensor | None, dtypes: Collection[torch.dtype] = DTYPES, fan_in: int = 1, triton: bool = False
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
        return Route.OPERATOR if x.is_cpu or (triton and used_on_gpu(x.device)) else Route.TORCH
    if x.is_cpu and choice().native is not None:
        kernel = Route.NATIVE
    elif triton and used_on_gpu(x.device):
        kernel = Route.TRITON
    else:
        return Route.TORCH
    if is_watched() or x.numel() == 0:
        return Route.TORCH
    plain = all(t is None or (type(t) in _PLAIN and t.device == x.device and not t.is_neg()) for t in (x, *others))
    return kernel if plain else Route.TORCH


_PLAIN = (Tensor, Parameter)


def trains_with(x: Tensor, *others: Tensor | None, mask: Tensor | None = None) -> bool:
    """Whether the compiled part is called with these tensors, all of float32, and a mask of booleans or of bits."""
    return (
        all(t is None or t.dtype is torch.float32 for t in others)
        and (mask is None or mask.dtype in (torch.bool, torch.uint8))
        and route(x, *others, mask, dtypes=(torch.float32,)) is Route.NATIVE
    )


def apply(function: Any, *arguments: Any) -> Any:
    """`function.apply(*arguments)` of an autograd function, or its forward alone where that cannot be.

    torch.func takes no function of this kind, and a traced graph (torch.jit.trace, the older ONNX exporter) with one in
    it could not be saved: they get the operations of its forward, which pass no surrogate gradient.

    Raises:
        DerivativeError: torch.func or a forward-mode derivative asks for a gradient.
    """
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and not is_watched()):
        return function.apply(*arguments)
    if not torch.is_grad_enabled() and not is_watched():  # or it would be told of the gradients of what learns
        return function.forward(_NoGradient(len(arguments)), *arguments)
    wanted = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments)
    if has_tangent(*arguments) or (wanted and functorch_level() is not None):
        raise DerivativeError(
            "a binary layer gives no derivative to torch.func (vmap, grad, jvp and the like) or in forward mode: its "
            "surrogate gradient is one of loss.backward() or torch.autograd.grad. To map a model over inputs without "
            "a gradient, call torch.func.vmap(model)(inputs) under torch.no_grad()."
        )
    if wanted and not is_tracing():
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

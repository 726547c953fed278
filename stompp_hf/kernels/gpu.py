"""1-bit products on a GPU: whether Triton is used for them, and their call."""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from ..integrations.torch import constant_when_compiled
from . import native
from .sizes import check

DEVICES = ("cuda",)
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


def used_on(device: torch.device) -> bool:
    """Whether Triton computes for tensors of a device."""
    return device.type in DEVICES and native.choice().mode != "torch" and triton_version() is not None


def linear(
    x: Tensor, threshold: Tensor | None, bits: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`kernels.linear` on a GPU: the same arguments, and bit for bit what torch gives on that device.

    Raises:
        ShapeError: the sizes do not fit together.
    """
    check(x.shape[-1], x.shape[-1], threshold, bits, scale, shift)
    triton_linear: Any = importlib.import_module(".triton_linear", __package__)
    return triton_linear.linear(x, threshold, bits, scale, shift, dtype)  # type: ignore[no-any-return]


def describe() -> str:
    """One line on what is used for a GPU's tensors, and why."""
    if native.choice().mode == "torch":
        used, why = "torch", f"{native.MODE}=torch"
    elif (version := triton_version()) is None:
        used, why = "torch", "triton cannot be imported (it comes with torch's builds for GPUs)"
    elif not torch.cuda.is_available():
        used, why = "nothing", f"there is no GPU (triton {version} is there)"
    else:
        used, why = "triton", f"triton {version} is there, for linear layers with binary inputs; the rest in torch"
    return f"on a GPU      {used}: {why}"

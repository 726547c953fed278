"""What is made of a tensor once and kept as long as the tensor lives, and made anew when the tensor changes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def derived(tensor: Tensor, name: str, make: Callable[[], Tensor]) -> Tensor:
    """`make()`, kept under a name; while a graph is traced, and for tensors without values, it is made each time."""
    if torch.compiler.is_compiling() or type(tensor) is not Tensor or tensor.is_meta:
        return make()
    state = (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
    kept: Any = _kept.get(tensor)
    if kept is None:
        kept = _kept[tensor] = {}
    found = kept.get(name)
    if found is None or found[0] != state:
        found = kept[name] = (state, make())
    return found[1]  # type: ignore[no-any-return]


def unchanged(tensor: Tensor, name: str, value: Tensor) -> Tensor:
    """What was kept under a name if it equals `value`, with what is derived from it; else `value`, from now on."""
    kept: Any = _kept.get(tensor)
    if kept is None:
        kept = _kept[tensor] = {}
    found = kept.get(name)
    if found is None or not torch.equal(found[1], value):
        found = kept[name] = (None, value)
    return found[1]  # type: ignore[no-any-return]

"""What is made of a tensor once, kept as long as the tensor lives, and made anew when the tensor changes.

Nothing is kept while somebody listens to torch (see `choosing.is_eager`): a graph would hold it for good. What is kept
is made outside of inference mode, whose tensors no training step could use later.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.weak import WeakTensorKeyDictionary

from .choosing import is_eager

_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Seen:
    """A tensor as it was: whether it is another by now.

    torch counts the changes of a tensor, and holding its memory makes sure that other numbers lie elsewhere. It counts
    none of a tensor of inference mode, whose numbers are copied and compared.
    """

    __slots__ = ("memory", "version")

    def __init__(self, tensor: Tensor) -> None:
        uncounted = tensor.is_inference()
        self.version = None if uncounted else tensor._version
        self.memory = tensor.detach().clone() if uncounted else tensor.detach()

    def is_still(self, tensor: Tensor) -> bool:
        """Whether the tensor holds what it held."""
        if self.version is None or tensor.is_inference():
            return self.memory.dtype is tensor.dtype and torch.equal(_wide(self.memory), _wide(tensor))
        return tensor._version == self.version and tensor.data_ptr() == self.memory.data_ptr()


def _wide(tensor: Tensor) -> Tensor:
    """A tensor's bytes as whole numbers of eight, where they are: they are compared four times as fast."""
    whole = tensor.is_contiguous() and tensor.dim() and tensor.shape[-1] * tensor.element_size() % 8 == 0
    return tensor.view(torch.int64) if whole and tensor.storage_offset() * tensor.element_size() % 8 == 0 else tensor


def countable(tensor: Any) -> Any:
    """A tensor, or an equal one that counts its changes in place of one of inference mode; None stays None."""
    if tensor is None or not tensor.is_inference():
        return tensor
    plain = _made(tensor.clone)
    return Parameter(plain, tensor.requires_grad) if isinstance(tensor, Parameter) else plain


def derived(tensor: Tensor, name: str, make: Callable[[], Tensor]) -> Tensor:
    """`make()`, kept under a name; while somebody listens, and for tensors without values, it is made each time."""
    if not is_eager() or type(tensor) not in (Tensor, Parameter) or tensor.is_meta:
        return make()
    kept = _kept_of(tensor)
    seen, value = kept.get(name, (None, None))
    if seen is None or not seen.is_still(tensor):
        value = _made(make)
        kept[name] = Seen(tensor), value
    return value


def unchanged(tensor: Tensor, name: str, make: Callable[[], Tensor]) -> Tensor:
    """What was kept under a name if it equals `make()`, with what is derived from it; else `make()`, from now on."""
    kept, value = _kept_of(tensor), _made(make)
    _, found = kept.get(name, (None, None))
    if found is None or not torch.equal(found, value):
        kept[name] = None, value
        return value
    return found


def _kept_of(tensor: Tensor) -> dict[str, tuple[Seen | None, Any]]:
    kept: Any = _kept.get(tensor)
    if kept is None:
        kept = _kept[tensor] = {}
    return kept  # type: ignore[no-any-return]


def _made(make: Callable[[], Tensor]) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return make()

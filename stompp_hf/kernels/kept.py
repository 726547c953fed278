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

from ..integrations.torch import Seen
from .choosing import is_eager

_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


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
    return _kept.setdefault(tensor, {})  # type: ignore[no-any-return]


def _made(make: Callable[[], Tensor]) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return make()

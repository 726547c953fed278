"""What each module of a model takes: parameters, and bytes as save_pretrained would write them."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..integrations.torch import saved_tensors
from ..integrations.transformers import not_saved
from ..modules.converted import Converted


@dataclass
class Size:
    """One module without its children.

    parameters: those of the plain model, weights in a packed layer included; binary: how many of them are or will be
    signs; stored: bytes in a checkpoint as the model is now; packed: bytes in one of `pack_model`; float32: bytes of
    the plain model in float32.
    """

    parameters: int = 0
    binary: int = 0
    stored: int = 0
    packed: int = 0
    float32: int = 0


def sizes(model: nn.Module) -> dict[str, Size]:
    """The size of every module that has tensors of its own, by name.

    A tensor that several modules share counts once, for the first of them. Scales, thresholds, clips and states that
    binarization adds are bytes and no parameters.
    """
    ignored = not_saved(model)
    seen: set[int] = set()
    found: dict[str, Size] = {}
    for name, module in model.named_modules():
        size = Size()
        for own, tensor in saved_tensors(module).items():
            if id(tensor) in seen or f"{name}.{own}" in ignored:
                continue
            seen.add(id(tensor))
            _add(size, module, own, tensor)
        if size != Size():
            found[name] = size
    return found


def _add(size: Size, module: Any, own: str, tensor: Tensor) -> None:
    size.stored += tensor.nbytes
    ours = module if isinstance(module, Converted) else None
    packed = None if ours is None else ours.packed_bytes(own, tensor)
    if ours is None or packed is None:
        size.packed += tensor.nbytes
        size.float32 += tensor.nbytes if not tensor.is_floating_point() else 4 * tensor.numel()
        size.parameters += tensor.numel() if isinstance(tensor, nn.Parameter) else 0
        return
    weights = ours.binary_weights_in(own)
    size.packed += packed
    size.parameters += weights
    size.binary += weights
    size.float32 += 4 * weights

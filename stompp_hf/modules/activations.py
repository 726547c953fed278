"""What may stand right before a binary layer: activations that change for it, and dropouts.

A ReLU's output has one sign, so the sign of it says nothing; and a dropout's zeros would all count as +1.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import activations as hub

from ..integrations.transformers import mark_initialized
from ..kernels import apply
from ..method.flag_bits import pack_flags, unpack_flags
from .converted import Converted

ABSORBABLE: dict[str, Callable[[Tensor], Tensor]] = {"ReLU": F.relu, "ReLU6": F.relu6, "Hardswish": F.hardswish}
"""Activations that a binary layer can compute itself: real entries see f(u), and the sign is that of u."""


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, kind: str) -> Tensor:  # type: ignore[override]
        ctx.kind = kind
        flags = {"ReLU": lambda: u > 0, "ReLU6": lambda: (u > 0) & (u < 6), "Hardswish": lambda: u}[kind]()
        kept, ctx.layout = pack_flags(flags)
        ctx.save_for_backward(kept)
        return u.view_as(u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (saved,) = ctx.saved_tensors
        if ctx.kind == "Hardswish":
            return torch.ops.aten.hardswish_backward(grad, saved), None
        return grad * unpack_flags(saved, ctx.layout), None


def gate(u: Tensor, kind: str) -> Tensor:
    """u itself, whose gradient passes through an absorbed activation f.

    Forward:  u
    Backward: dL/du = g * f'(u)
    Source:   this library's choice. The surrogate gradient of a frozen entry stands for that of f: passing it where f
              is flat doubles what goes up at every layer, and it grows with depth without bound.
    """
    return apply(_Gate, u, kind)  # type: ignore[no-any-return]


class Changed(Converted):
    """A module that was changed in place (its `__class__`), because of the binary layers behind it."""

    plain_class: ClassVar[type[nn.Module]]

    def restore(self) -> nn.Module:
        """Turn it back into what it was, in place."""
        module: Any = self
        module.__dict__.pop("readers", None)
        module.__class__ = self.plain_class
        return module  # type: ignore[no-any-return]


def changed_classes(kind: Any, prefix: str, plains: Iterable[type[nn.Module]]) -> dict[type[nn.Module], Any]:
    """The class of a kind of change for each of some plain classes, in the kind's module, where pickle looks for it."""
    home = kind.__module__
    own = {plain: {"plain_class": plain, "__module__": home} for plain in plains}
    found = {plain: type(f"{prefix}{plain.__name__}", (kind, plain), values) for plain, values in own.items()}
    vars(sys.modules[home]).update({cls.__name__: cls for cls in found.values()})
    return found


class Bypassed(Changed):
    """An activation that was absorbed or dropped: it passes its input on."""

    def forward(self, input: Tensor) -> Tensor:  # named as in torch
        return input


_OF_TRANSFORMERS = (
    *("GELUActivation", "NewGELUActivation", "FastGELUActivation", "QuickGELUActivation", "AccurateGELUActivation"),
    *("GELUTanh", "ClippedGELUActivation", "SiLUActivation", "MishActivation"),
)
DROPPABLE = (nn.GELU, nn.SiLU, nn.Mish, *(getattr(hub, name) for name in _OF_TRANSFORMERS if hasattr(hub, name)))
"""Activations that may be dropped, but not absorbed. Their sign is that of u only near 0: in float32, gelu(-6) is -0.0,
which counts as +1, so that of sums of hundreds of plain signs most come out as +1."""

BYPASSED = changed_classes(Bypassed, "Bypassed", (*(getattr(nn, name) for name in ABSORBABLE), *DROPPABLE))


class Replaced(Changed):
    """A smooth activation that became a ReLU: what is near 0 is 0, so that two levels {0, 2a} fit."""

    def forward(self, input: Tensor) -> Tensor:  # named as in torch
        return F.relu(input)


REPLACED = changed_classes(Replaced, "Replaced", DROPPABLE)

ABSORBED, DROPPED, REPLACEMENT = "absorbed", "dropped", "relu"
"""What a plan says of an activation."""


def class_for(how: str, kind: type[nn.Module]) -> Any:
    """The class that an activation of a kind gets, by what the plan says of it."""
    return (REPLACED if how == REPLACEMENT else BYPASSED)[kind]


RPRELU_TENSORS = ("rprelu_shift", "rprelu_slope", "rprelu_bias")
"""Names of the parameters that an RPReLU adds."""


class RPReLU(Changed, nn.ReLU):
    """A ReLU with a learnable shift before it, a slope below it and a shift after it, one of each a channel.

    Forward:  y = f(x - shift) + bias, f(v) = v if v > 0 else slope * v; all start at 0, where it is the ReLU
    Source:   ReActNet (Liu et al., 2020), whose slope starts at 0.25; starting at 0 is this library's choice.
    """

    plain_class = nn.ReLU
    own_names = RPRELU_TENSORS

    rprelu_shift: Tensor
    rprelu_slope: Tensor
    rprelu_bias: Tensor
    trailing: int

    def begin(self, channels: int, trailing: int, like: Tensor) -> None:
        """Add the parameters, (channels,) each; `trailing` dimensions of x come after its channels."""
        for name in RPRELU_TENSORS:
            parameter = nn.Parameter(like.new_zeros(channels))
            mark_initialized(parameter)
            self.register_parameter(name, parameter)
        self.trailing = trailing

    def packed_bytes(self, name: str, tensor: Tensor) -> int | None:
        return tensor.nbytes if name in RPRELU_TENSORS else None

    def restore(self) -> nn.Module:
        for name in (*RPRELU_TENSORS, "trailing"):
            if hasattr(self, name):
                delattr(self, name)
        return super().restore()

    def forward(self, input: Tensor) -> Tensor:  # named as in torch
        shift, slope, bias = (getattr(self, n).reshape(-1, *[1] * self.trailing) for n in RPRELU_TENSORS)
        x = input - shift
        return torch.where(x > 0, x, slope * x) + bias

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *others)
        self.is_without_own(state_dict, prefix, others[2])


class Paused(Changed):
    """A dropout that stops as soon as a layer that reads it has frozen entries: its zeros would count as +1."""

    readers: list[Any]  # a list: the layers are not to be registered a second time

    def forward(self, input: Tensor) -> Tensor:  # named as in torch
        if any(reader.has_frozen for reader in self.readers):
            return input
        return self.plain_class.forward(self, input)  # type: ignore[no-any-return]


PAUSED = changed_classes(Paused, "Paused", (nn.Dropout, nn.Dropout2d))

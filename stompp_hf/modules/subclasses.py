"""Binary and packed classes for subclasses of nn.Linear and the like (FalconLinear) that compute as their base."""

import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.torch import buffers_of, modules_of, parameters_of
from ..integrations.transformers import INIT_WEIGHTS
from .binary_layer import BinaryLayer
from .packed import PACKED_CLASSES, register_packed
from .runtime_classes import Made, made_class, name_for

TOLERANCE = 1e-4
"""By how much the output of a subclass may differ from its base's, in parts of the largest."""

_HARMLESS = ("__init__", INIT_WEIGHTS, "reset_parameters", "extra_repr", "__repr__")
"""Methods that compute nothing while a model runs."""


def class_for(kind: Any, plain: type) -> Any:
    """The binary or packed class `kind`, for a subclass of its plain class; restored, a layer is of that again."""
    binary_kind = getattr(kind, "binary_class", kind)
    packed_kind = PACKED_CLASSES.get(binary_kind)
    own = {"plain_class": plain, "forward": forward_of(binary_kind)}
    binary = made_class(class_for, binary_kind, plain, name_for(binary_kind, plain), (binary_kind, plain), **own)
    if packed_kind is not None and binary not in PACKED_CLASSES:
        own = {"plain_class": plain, "forward": forward_of(packed_kind), "binary_class": binary}
        bases = (packed_kind, binary)
        register_packed(made_class(class_for, packed_kind, plain, name_for(packed_kind, plain), bases, **own))
    return binary if kind is binary_kind else PACKED_CLASSES[binary]


def forward_of(kind: Any) -> Any:
    """The forward of a class, whatever its input is called."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = (*args, *kwargs.values())  # the subclass may have another name for its input
        return kind.forward(self, x)  # type: ignore[no-any-return]

    return forward


def has_plain_tensors(layer: nn.Module) -> bool:
    """Whether a layer holds a weight, perhaps a bias, and no other tensor or module that it could compute with."""
    others = any(isinstance(value, Tensor) for value in vars(layer).values())
    named = parameters_of(layer).keys() in ({"weight"}, {"weight", "bias"})
    return named and not (others or buffers_of(layer) or modules_of(layer))


def unlike_its_base(layer: nn.Module, binary: type[BinaryLayer]) -> str | None:
    """Why a layer is not what its binary class takes it for; None for a class that is registered itself.

    A subclass's forward is run with other weights and on other inputs than it will see, large ones, in training mode
    and in eval mode, and must give what its base's gives. Nothing of the layer is changed.
    """
    if not issubclass(binary, Made):
        return None
    kind, plain = binary.made_from
    readers = [name for name in methods_with_weight(plain, kind.plain_class) if name != "forward"]
    if readers:
        return f"its {readers[0]} uses the weight, too"
    if len(inspect.signature(plain.forward).parameters) != 2:  # type: ignore[attr-defined]
        return "its forward takes more than an input"
    try:
        same = _same_outputs(layer, kind)
    except Exception as error:
        return f"it does not run on an input of its base ({type(error).__name__})"
    return None if same else "it computes something else"


def methods_with_weight(plain: type, base: type) -> Iterator[str]:
    """Names of the methods that a subclass of `base` adds to it and whose code names a weight, save harmless ones."""
    for cls in plain.__mro__[: plain.__mro__.index(base)]:
        for name, value in vars(cls).items():
            function = inspect.unwrap(getattr(value, "fget", None) or getattr(value, "__func__", value))
            if name not in _HARMLESS and inspect.isfunction(function) and _names_weight(function.__code__):
                yield name


def _names_weight(code: CodeType) -> bool:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return "weight" in (*code.co_names, *code.co_consts) or any(map(_names_weight, inner))


def _same_outputs(layer: Any, kind: Any) -> bool:
    attributes, real = dict(vars(layer)), {parameter: parameter.data for parameter in layer.parameters()}
    device = layer.weight.device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            for parameter, data in real.items():
                parameter.data = _waves(data.shape, device)
            for training in (True, False):
                layer.training = training
                for shape in _input_shapes(layer, kind):
                    x = _waves(shape, device)
                    y, expected = type(layer).forward(layer, x.clone()), kind.plain_class.forward(layer, x)
                    if not isinstance(y, Tensor) or y.shape != expected.shape:
                        return False
                    if not bool((y - expected).abs().max() <= TOLERANCE * expected.abs().max()):
                        return False
        return True
    finally:
        for parameter, data in real.items():
            parameter.data = data
        vars(layer).clear()
        vars(layer).update(attributes)


def _waves(shape: Any, device: torch.device) -> Tensor:
    """Numbers of both signs and many sizes, without drawing any."""
    count = torch.Size(shape).numel()
    return torch.arange(1, count + 1, dtype=torch.float32, device=device).sin_().mul_(10.0).reshape(shape)


def _input_shapes(layer: Any, kind: Any) -> list[tuple[int, ...]]:
    if not hasattr(layer, "kernel_size"):
        features = kind.product.features(layer.weight)
        return [(5, features), (2, 3, features)]
    reach = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
    return [(2, layer.in_channels, *(dilation * kernel + 2 * stride for kernel, dilation, stride in reach))]

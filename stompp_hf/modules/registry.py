"""From a plain layer class to its binary class, by exact type: a subclass may compute something else."""

import importlib

from torch import nn

from ..errors import ConfigError
from .base import BinaryLayer

BINARY_CLASSES: dict[type[nn.Module], type[BinaryLayer]] = {}

_ON_DEMAND = {
    "timm.layers.conv2d_same.Conv2dSame": ".conv2d_same",
    "transformers.models.efficientnet.modeling_efficientnet.EfficientNetDepthwiseConv2d": ".conv2d_efficientnet",
}
"""Classes of packages that need not be installed or imported: made binary when the first such layer is met."""


def register(binary_class: type[BinaryLayer]) -> type[BinaryLayer]:
    """Class decorator: add a binary class under its `plain_class`."""
    plain = binary_class.plain_class
    if plain in BINARY_CLASSES:
        raise ConfigError(f"{plain.__name__} has a binary class already: {BINARY_CLASSES[plain].__name__}.")
    BINARY_CLASSES[plain] = binary_class
    return binary_class


def binary_class_of(module: nn.Module | None) -> type[BinaryLayer] | None:
    """The binary class of a plain layer, or None if there is none."""
    plain = type(module)
    if plain not in BINARY_CLASSES:
        on_demand = _ON_DEMAND.get(f"{plain.__module__}.{plain.__qualname__}")
        if on_demand is not None:
            importlib.import_module(on_demand, __package__)
    return BINARY_CLASSES.get(plain)  # type: ignore[arg-type]

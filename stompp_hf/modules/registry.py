"""From a plain layer class to its binary class. A subclass has one of its own, where it computes what its base does."""

import importlib

from torch import nn

from ..errors import ConfigError
from .binary_layer import BinaryLayer

BINARY_CLASSES: dict[type[nn.Module], type[BinaryLayer]] = {}

_ON_DEMAND = {"timm.layers.conv2d_same.Conv2dSame": ".conv2d_same"}
"""Classes of packages that need not be installed or imported: made binary when the first such layer is met."""


def register(binary_class: type[BinaryLayer]) -> type[BinaryLayer]:
    """Class decorator: add a binary class under its `plain_class`."""
    plain = binary_class.plain_class
    if plain in BINARY_CLASSES:
        raise ConfigError(f"{plain.__name__} has a binary class already: {BINARY_CLASSES[plain].__name__}.")
    BINARY_CLASSES[plain] = binary_class
    return binary_class


def binary_class_of(module: nn.Module | None) -> type[BinaryLayer] | None:
    """The binary class of a plain layer, or None if there is none.

    An instance of a subclass without tensors of its own gets one that is made for it. Whether it computes the same
    product too is another question, `unlike_its_base`: selection asks it, and a saved plan has asked it.
    """
    plain = type(module)
    found = _registered(plain)
    if found is not None or module is None or isinstance(module, BinaryLayer):
        return found
    kind = next(filter(None, map(_registered, plain.__mro__)), None)
    if kind is None:
        return None
    subclasses = importlib.import_module(".subclasses", __package__)
    return subclasses.class_for(kind, plain) if subclasses.has_plain_tensors(module) else None


def unlike_its_base(module: nn.Module) -> str | None:
    """Why a layer's binary class does not fit it after all: it is of a subclass that computes something else."""
    binary = binary_class_of(module)
    subclasses = importlib.import_module(".subclasses", __package__)
    return None if binary is None else subclasses.unlike_its_base(module, binary)


def _registered(plain: type) -> type[BinaryLayer] | None:
    on_demand = _ON_DEMAND.get(f"{plain.__module__}.{plain.__qualname__}")
    if plain not in BINARY_CLASSES and on_demand is not None:
        importlib.import_module(on_demand, __package__)
    return BINARY_CLASSES.get(plain)

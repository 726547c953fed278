"""From a plain layer class to its binary class, by exact type: a subclass may compute something else."""

from torch import nn

from ..errors import ConfigError
from .base import BinaryLayer

BINARY_CLASSES: dict[type[nn.Module], type[BinaryLayer]] = {}


def register(binary_class: type[BinaryLayer]) -> type[BinaryLayer]:
    """Class decorator: add a binary class under its `plain_class`."""
    plain = binary_class.plain_class
    if plain in BINARY_CLASSES:
        raise ConfigError(f"{plain.__name__} has a binary class already: {BINARY_CLASSES[plain].__name__}.")
    BINARY_CLASSES[plain] = binary_class
    return binary_class

"""accelerate's insides: the forward that its hooks keep. tests/test_integrations.py tells when the name goes."""

from typing import Any


def is_hooked(module: Any) -> bool:
    """Whether accelerate's hooks are around a module's forward, as where weights are offloaded."""
    return "_old_forward" in module.__dict__


def has_replaced_forward(module: Any) -> bool:
    """Whether a module has a forward of its own that is not accelerate's, which keeps `_old_forward`."""
    return "forward" in module.__dict__ and not is_hooked(module)


def rebind_forward(module: Any) -> None:
    """accelerate's hooks keep the bound forward of the class that a module had when they were added: `_old_forward`."""
    if is_hooked(module):
        module._old_forward = type(module).forward.__get__(module)

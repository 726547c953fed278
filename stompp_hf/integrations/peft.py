"""PEFT's insides: how its classes are made to ask first, and what they call what is asked about."""

import functools
import inspect
from collections.abc import Callable
from importlib import metadata
from typing import Any

from packaging.version import Version

from ..errors import AdapterError

OLDEST = "0.21"
"""Before it, UniLoRA names none of its adapters, and is merged unasked; before 0.20, LoRA's variants are not marked."""

Check = Callable[..., None]


def _asking(method: Callable[..., Any], check: Check) -> Callable[..., Any]:
    """A method that first runs a check with the same arguments, by name: PEFT's classes order them differently."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def checked(*args: Any, **kwargs: Any) -> Any:
        own, *named = signature.bind(*args, **kwargs).arguments.items()
        check(own[1], **dict(named))
        return method(*args, **kwargs)

    checked.asks_first = True  # type: ignore[attr-defined]
    return checked


def _guard(cls: Any, checks: dict[str, Check]) -> None:
    """Guard the methods that a class itself defines, and those of all classes derived from it."""
    for name, check in checks.items():
        method = vars(cls).get(name)
        if callable(method) and not hasattr(method, "asks_first"):
            setattr(cls, name, _asking(method, check))
    for derived in cls.__subclasses__():
        _guard(derived, checks)


def guard_family(root: Any, checks: dict[str, Check]) -> None:
    """Guard a class, and all that are or will be derived from it: each kind of adapter has a merge of its own."""

    def init_subclass(cls: Any, /, **kwargs: Any) -> None:
        super(root, cls).__init_subclass__(**kwargs)
        _guard(cls, checks)

    root.__init_subclass__ = classmethod(init_subclass)
    _guard(root, checks)


def check_version() -> None:
    """Raise AdapterError if PEFT is older than what is known here."""
    if Version(found := metadata.version("peft")) < Version(OLDEST):
        raise AdapterError(
            f"PEFT {found} does not say of all adapters whether they read, change or are merged into a layer's weight, "
            f"and beside binary layers none of them may: pip install -U 'peft>={OLDEST}'."
        )


def with_targets(tuner: Any, config: Any, model: Any) -> Any:
    """An adapter's configuration with the targets that PEFT takes by default: `_prepare_adapter_config`."""
    return tuner._prepare_adapter_config(config, tuner.get_model_config(model))


def is_target(tuner: Any, config: Any, name: str) -> bool:
    """Whether an adapter is to stand around the module of this name: `_check_target_module_exists`."""
    return bool(tuner._check_target_module_exists(config, name))


def adapters_of(layer: Any) -> set[str]:
    """Names of the adapters in a layer of PEFT's: `_get_available_adapters`."""
    return set(layer._get_available_adapters())

"""A module of another library that is to be changed when somebody imports it, and not imported for that."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Change = Callable[[Any], None]


class _Watch(MetaPathFinder):
    """Finds one module as the other finders do, and has it changed once it is executed."""

    def __init__(self, name: str, change: Change) -> None:
        self.name, self.change = name, change

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if not isinstance(finder, _Watch))
        found = next((spec for spec in others if spec is not None), None)
        loader: Any = None if found is None else found.loader
        if loader is not None:
            execute = loader.exec_module

            def execute_and_change(module: ModuleType) -> None:
                execute(module)
                self.change(module)

            loader.exec_module = execute_and_change
        return found


def when_imported(name: str, change: Change) -> None:
    """Call `change` with the module of this name: now if it is there, else as soon as it has been imported."""
    if name in sys.modules:
        change(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Watch(name, change))

"""Who reads what some modules make: seen in one run of the model."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..integrations.torch import has_forward_hooks, tensors_in
from ..surgery.recorder import Recorder

Fits = Callable[[Any, Any, Tensor], bool]


class Readers(Recorder):
    """Notes which modules read the outputs of some others.

    Args:
        makers: whose outputs are followed.
        readers: who may read them; the rest of the model is nobody in particular.
        fits: whether a reader can do something with what a maker made.
    """

    def __init__(self, makers: Iterable[Any], readers: Iterable[Any], fits: Fits = lambda *_: True) -> None:
        self.fits = fits
        self.made_by = WeakTensorKeyDictionary()
        self.read_by: dict[Any, set[Any]] = {maker: set() for maker in makers}  # readers, and None for all else
        self.reads_of: dict[Any, set[Any]] = {reader: set() for reader in readers}
        self.inside: Any = None

    def watches(self, name: str, module: Any) -> bool:
        """Hooks of others could read or replace what passes by."""
        return (module in self.read_by or module in self.reads_of) and not has_forward_hooks(module)

    def operation(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        self._note(tensors_in((args, kwargs)), self.inside)

    def _note(self, tensors: list[Tensor], reader: Any) -> None:
        for tensor in tensors:
            if (maker := self.made_by.get(tensor)) is not None:
                self.read_by[maker].add(reader)

    def enter(self, name: str, module: Any, args: Any, kwargs: Any) -> None:
        if module not in self.reads_of:
            return
        x = args[0] if args else None
        made = self.made_by.get(x) if isinstance(x, Tensor) else None
        self.reads_of[module].add(made if made is not None and self.fits(made, module, args[0]) else None)
        self.inside = module

    def leave(self, name: str, module: Any, args: Any, output: Any) -> None:
        if module in self.reads_of:
            self.inside = None
        else:
            self.made_by[output] = module

    def outputs(self, found: list[Tensor]) -> None:
        self._note(found, None)

    def of(self, maker: Any) -> set[Any]:
        """The readers of a maker, if they alone read what it makes, and read nothing else; or nobody."""
        readers: set[Any] = self.read_by[maker]
        return readers if None not in readers and all(self.reads_of[one] == {maker} for one in readers) else set()

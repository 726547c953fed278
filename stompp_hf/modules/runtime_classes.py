"""Classes made at run time: what one of ours is to a class of torch, for a subclass of that class."""

from collections.abc import Callable
from typing import Any, ClassVar

Maker = Callable[[Any, type], type]
_MADE: dict[tuple[Maker, type, type], type] = {}


class Made:
    """Mixin of such a class: what it is of is pickled and copied by the way in which its class was made."""

    maker: ClassVar[Maker]
    made_from: ClassVar[tuple[Any, type]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *rest = tuple(super().__reduce_ex__(protocol))
        return (_empty, (type(self).maker, *type(self).made_from), *rest)


def made_class(maker: Maker, kind: Any, plain: type, name: str, bases: tuple[type, ...], **attributes: Any) -> Any:
    """The class that `maker` makes of (kind, plain), the same one each time.

    Args:
        maker: gives this class for (kind, plain), in any process; a function of a module.
        kind, plain: classes that pickle finds by their names.
        name, bases, attributes: its own.
    """
    if (maker, kind, plain) not in _MADE:
        about = {"maker": staticmethod(maker), "made_from": (kind, plain), "__doc__": kind.__doc__}
        _MADE[maker, kind, plain] = type(name, (*bases, Made), {**about, "__module__": __name__, **attributes})
    return _MADE[maker, kind, plain]


def name_for(kind: Any, plain: type) -> str:
    """The name of what is to `plain` what `kind` is to its plain class."""
    return str(kind.__name__).replace(kind.plain_class.__name__, plain.__name__)


def _empty(maker: Maker, kind: Any, plain: type) -> Any:
    cls: Any = maker(kind, plain)
    return cls.__new__(cls)

"""Classes made at run time: what one of ours is to a class of torch, for a subclass of that class."""

from collections.abc import Callable
from typing import Any, ClassVar

Maker = Callable[[Any, type], type]
_MADE: dict[tuple[type, type], type] = {}


class Made:
    """Mixin of such a class: what it is of is pickled and copied by the way in which its class was made."""

    maker: ClassVar[Maker]
    made_from: ClassVar[tuple[Any, type]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *rest = tuple(super().__reduce_ex__(protocol))
        return (_empty, (type(self).maker, *type(self).made_from), *rest)


def made_class(maker: Maker, kind: Any, plain: type, inner: type | None = None, **attributes: Any) -> Any:
    """The class that is to `plain` what `kind` is to kind.plain_class, a base of it; the same one each time.

    Args:
        maker: gives this class for (kind, plain), in any process; a function of a module.
        kind: a class with a `plain_class`.
        plain: a subclass of kind.plain_class.
        inner: what it is a subclass of beside `kind`; `plain` if None.
        attributes: its own attributes.
    """
    if (kind, plain) not in _MADE:
        name = kind.__name__.replace(kind.plain_class.__name__, plain.__name__)
        about = {"maker": staticmethod(maker), "made_from": (kind, plain), "__doc__": kind.__doc__}
        about |= {"plain_class": plain, "__module__": __name__}
        _MADE[kind, plain] = type(name, (kind, inner or plain, Made), {**about, **attributes})
    return _MADE[kind, plain]


def _empty(maker: Maker, kind: Any, plain: type) -> Any:
    cls: Any = maker(kind, plain)
    return cls.__new__(cls)

"""What this library says on a terminal: with its name in front, each thing once, and never twice over."""

import logging
import sys
from typing import Any
from weakref import WeakKeyDictionary

LIBRARY = __name__.partition(".")[0]

_said: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


class LastResort(logging.Handler):
    """Writes to stderr what no other handler takes, as Python's own last resort does, which leaves out who speaks.

    As soon as there is another handler on the way up (logging.basicConfig, a handler of one's own, pytest's), this one
    is silent. A progress bar is moved out of the way.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if self._is_taken(record) or sys.stderr is None:
            return
        try:
            text, bars = self.format(record), sys.modules.get("tqdm")
            if bars is not None:
                bars.tqdm.write(text, file=sys.stderr)
            else:
                sys.stderr.write(f"{text}\n")
        except Exception:
            self.handleError(record)

    def _is_taken(self, record: logging.LogRecord) -> bool:
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            if any(not isinstance(handler, LastResort) for handler in logger.handlers):
                return True
            logger = logger.parent if logger.propagate else None
        return False


def install() -> None:
    """Give this library's logger its last resort; nothing outside of that logger changes."""
    logger = logging.getLogger(LIBRARY)
    if not any(isinstance(handler, LastResort) for handler in logger.handlers):
        handler = LastResort()
        handler.setFormatter(logging.Formatter(f"[{LIBRARY}] %(message)s"))
        logger.addHandler(handler)


def warn_once(logger: logging.Logger, about: Any, message: str, *args: Any) -> None:
    """Log a warning, unless the very same was said about this object before; other words are a new fact."""
    said, text = _said.setdefault(about, set()), message % args
    if text not in said:
        said.add(text)
        logger.warning(message, *args, stacklevel=2)


def say(logger: logging.Logger, message: str, *args: Any) -> None:
    """Log a line that is no warning, and is to be seen wherever warnings are."""
    if logger.isEnabledFor(logging.WARNING):
        logger.handle(logger.makeRecord(logger.name, logging.INFO, __file__, 0, message, args, None))

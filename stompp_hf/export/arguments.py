"""What every export to a file asks of its arguments, and a file that is there once it is complete."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..errors import ExportError


def check_choices(caller: str, values: Mapping[str, str], choices: Mapping[str, Sequence[str]]) -> None:
    """Raise ExportError for an option that is none of its choices."""
    for option, value in values.items():
        if value not in choices[option]:
            known = " or ".join(map(repr, choices[option]))
            raise ExportError(f"{caller}: {option} is {known}, and not {value!r}.")


def refuse_folder(caller: str, path: Path, example: str) -> None:
    """Raise ExportError where a file is to be written, and a folder is there."""
    if path.is_dir():
        raise ExportError(f"{caller}: {path} is a folder; name the file in it, as in {path / example}.")


@contextlib.contextmanager
def completed(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; what is written there, and files next to it, go to their place at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        yield Path(folder, path.name)
        for part in sorted(Path(folder).iterdir(), key=lambda part: part.name == path.name):
            part.replace(path.parent / part.name)

"""What the grids share: which cells are asked for, and files that are written whole or not at all."""

import fnmatch
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C")


def chosen(cells: Iterable[C], patterns: list[str] | None) -> list[C]:
    """The cells whose id fits one of some shell-style patterns, each once; all of them without patterns.

    Raises SystemExit if none fits.
    """
    found = list({cell.id: cell for cell in cells}.values())  # type: ignore[attr-defined]
    if patterns:
        found = [c for c in found if any(fnmatch.fnmatchcase(c.id, p) for p in patterns)]  # type: ignore[attr-defined]
    if not found:
        raise SystemExit(f"--only {' '.join(patterns or [])}: no cell's id fits; see them with --list_cells True.")
    return found


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(value) + "\n", encoding="utf-8")
    part.replace(path)

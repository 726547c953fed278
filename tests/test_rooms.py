"""A room imports only rooms below it: the contract in pyproject.toml, late imports included."""

import subprocess
import sys
from pathlib import Path

import pytest


def test_rooms_import_only_what_is_below_them() -> None:
    pytest.importorskip("importlinter")
    config = str(Path(__file__).parent.parent / "pyproject.toml")
    # In a process of its own: it sets logging up anew.
    code = f"import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports({config!r}, no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

"""A room imports only rooms below it: the contract in pyproject.toml, late imports included."""

from pathlib import Path

import pytest


def test_rooms_import_only_what_is_below_them() -> None:
    cli = pytest.importorskip("importlinter.cli")
    config = Path(__file__).parent.parent / "pyproject.toml"
    assert cli.lint_imports(config_filename=str(config), no_cache=True) == 0

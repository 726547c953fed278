"""The agreement matrix: the same run in one process and two, in both precisions, compiled and checkpointed."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "examples" / "benchmarks" / "agreement.py"


def table(*options: str) -> list[list[str]]:
    """The cells of the printed table, row by row; the script ends with an error where a row disagrees."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    return [[part.strip() for part in line.strip("|").split("|")] for line in lines[2:]]


def check(rows: list[list[str]]) -> None:
    assert all(row[-1] == "yes" for row in rows)
    assert len({row[6] for row in rows}) == 1  # masks do not depend on precision, surrogate or processes
    for row in rows:
        assert int(row[7]) == (3 if row[2] == "compile" else 0)  # a graph a state


def test_a_part_of_the_matrix_agrees():
    rows = table("--reduced")
    assert len(rows) == 8 and {row[0] for row in rows} == {"plain", "DDP x2", "FSDP2 x2"}
    check(rows)


@pytest.mark.slow
def test_the_whole_matrix_agrees():
    rows = table()
    assert len(rows) == 48
    check(rows)

"""Runs of scripts on several processes."""

import subprocess
from typing import Any

OUTLIVED = "terminate called without an active exception"
"""Of gloo, whose threads may outlive an interpreter that has done its work; it then aborts."""


def run_to_its_end(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """As subprocess.run with captured text, and up to twice more where gloo aborted."""
    for _ in range(3):
        result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
        if result.returncode == 0 or OUTLIVED not in result.stderr:
            break
    return result

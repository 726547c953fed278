"""Compiled kernels limited to one set of instructions."""

from collections.abc import Iterator

import pytest

from stompp_hf import kernels


def limited_to(instructions: str) -> Iterator[str]:
    """The body of a fixture: these instructions, or a skip where the CPU has not got them; the environment's after."""
    if kernels.use("c", instructions).instructions != instructions:
        kernels.use()
        pytest.skip(f"this CPU has no {instructions}")
    yield instructions
    kernels.use()

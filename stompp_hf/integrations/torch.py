"""torch's insides: one function a private name, or the name itself where a call more would cost."""

from collections.abc import Callable
from typing import Any


def constant_when_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.assume_constant_result, which imports torch._dynamo: it stands on `_dynamo_marked_constant`."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function

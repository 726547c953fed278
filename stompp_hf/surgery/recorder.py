"""Recorder: one run of a model that leaves no trace, and what it tells of modules, operations and outputs."""

import contextlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..integrations.torch import TorchDispatchMode, remove_all, tensors_in
from .running import example_inputs_of, run, undisturbed

logger = logging.getLogger(__name__)
Found = TypeVar("Found")
Around = Callable[[nn.Module], contextlib.AbstractContextManager]


class Recorder:
    """Told what happens in one run of a model. A subclass says which modules it watches, and notes what it wants.

    The order of a module's call: `enter`, the operations and modules in it, `leave`. A subclass that has `operation`
    is told of every operation of torch, wherever it happens.
    """

    def watches(self, name: str, module: nn.Module) -> bool:
        """Whether `enter` and `leave` are called for a module."""
        return True

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A watched module is called."""

    def leave(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A watched module has computed its output."""

    operation: Callable[[Any, Any, Any, Any], None] | None = None
    """(operator, arguments, keyword arguments, result) of an operation; None where nothing is to be told."""

    def outputs(self, found: list[Tensor]) -> None:
        """The model gave these."""

    def record(self, model: nn.Module, inputs: Any, around: Around = undisturbed) -> Any:
        """Run the model on `inputs`, inside of `around(model)`, and return its outputs. No hook is left."""
        handles: list[Any] = []
        try:
            for name, module in model.named_modules():
                if self.watches(name, module):
                    handles.append(module.register_forward_pre_hook(partial(self.enter, name), with_kwargs=True))
                    handles.append(module.register_forward_hook(partial(self.leave, name)))
            listening = contextlib.nullcontext() if self.operation is None else _Operations(self.operation)
            with around(model), listening:
                outputs = run(model, inputs)
                self.outputs(tensors_of(outputs))
            return outputs
        finally:
            remove_all(handles)


class _Operations(TorchDispatchMode):
    def __init__(self, note: Callable[[Any, Any, Any, Any], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.note(func, args, kwargs, result)
        return result


def on_inputs(
    model: nn.Module, example_inputs: Any, look: Callable[[Any], Found], what: str, advice: str
) -> Found | None:
    """`look(inputs)` on the inputs that the caller gave, or on made-up ones; then failing is a warning and None.

    Raises:
        Exception: whatever the model raises on inputs that the caller gave.
    """
    inputs = example_inputs_of(model) if example_inputs is None else example_inputs
    kind = type(model).__name__
    if inputs is None:
        logger.warning("no %s of %s: %s", what, kind, advice)
        return None
    try:
        return look(inputs)
    except Exception as error:
        if example_inputs is not None:
            raise
        logger.warning("no %s of %s (%s: %s): %s", what, kind, type(error).__name__, error, advice)
        return None


def tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors among a model's outputs, in order."""
    return tensors_in(plain_outputs(outputs))


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    """Whether outputs are the same, to the bit; where the first ones are NaN, the others may be anything."""
    return len(before) == len(after) and all(map(_equal, before, after))


def _equal(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left, right) or (left.shape == right.shape and bool(((left == right) | left.isnan()).all()))


def plain_outputs(outputs: Any) -> Any:
    """A model's outputs as what `tensors_in` looks into: mappings, and the attributes of any other object."""
    if hasattr(outputs, "keys"):
        return dict(outputs)
    return vars(outputs) if hasattr(outputs, "__dict__") and not isinstance(outputs, Tensor) else outputs

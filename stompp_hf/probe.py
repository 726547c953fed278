"""One forward pass before anything is converted: execution order, layers that never run, what feeds which layer."""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .dataflow import DataFlow
from .running import example_inputs_of, run, untouched
from .weight_readers import read_elsewhere

logger = logging.getLogger(__name__)


@dataclass
class Trace:
    """What the probe saw. Times count the calls of hooked modules, from 0.

    bypassed: the layers that were called, and whose weight something else reads as well.
    """

    flow: DataFlow
    first_call: dict[str, int] = field(default_factory=dict)
    producers: dict[str, str] = field(default_factory=dict)
    bypassed: set[str] = field(default_factory=set)

    def order(self) -> list[str]:
        """Names by first call."""
        return sorted(self.first_call, key=lambda name: self.first_call[name])


def probe(model: nn.Module, candidates: dict[str, nn.Module], example_inputs: Any = None) -> Trace | None:
    """Run one batch through the model and note when each candidate is called, and on whose output; and once more, and
    once without hooks, to note whose weight is read past its layer. Nothing is left on the model.

    Args:
        model: the unconverted model.
        candidates: the layers to watch, by name.
        example_inputs: keyword arguments, a tuple of arguments, or one tensor; made from the config if None.

    Returns:
        The trace, or None (with a warning) when no inputs could be made or the model did not run on made-up ones.

    Raises:
        Exception: whatever the model raises on inputs that the caller gave.
    """
    inputs = example_inputs_of(model) if example_inputs is None else example_inputs
    if inputs is None:
        logger.warning("no probe of %s: %s", type(model).__name__, _ADVICE)
        return None
    trace, clock = Trace(DataFlow(candidates)), 0
    names = {id(module): name for name, module in candidates.items()}
    made: dict[tuple[int, torch.Size], tuple[str, torch.Tensor]] = {}  # keeps tensors alive: an address is not reused

    def tensor_key(tensor: torch.Tensor) -> tuple[int, torch.Size]:
        return tensor.data_ptr(), tensor.shape

    def before(module: nn.Module, args: Any) -> None:
        nonlocal clock
        name = names[id(module)]
        trace.first_call.setdefault(name, clock)
        clock += 1
        if args and isinstance(args[0], torch.Tensor):
            source = made.get(tensor_key(args[0]))
            trace.producers[name] = source[0] if source and source[0] != "Dropout" else trace.producers.get(name, "")

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            kind = type(module).__name__
            if isinstance(module, nn.Dropout) and args and isinstance(args[0], torch.Tensor):
                source = made.get(tensor_key(args[0]))  # in eval mode a dropout only passes its input on
                kind = source[0] if source else kind
            made[tensor_key(output)] = (kind, output)

    handles = [module.register_forward_pre_hook(before) for module in candidates.values()]
    handles += [module.register_forward_hook(after) for module in model.modules() if not list(module.children())]
    handles += trace.flow.watch(model)
    try:
        with untouched(model), trace.flow:
            trace.flow.close(run(model, inputs))
        for handle in handles:
            handle.remove()
        # Adapters that read the weight of the layer that they are around are refused by name (`check_wrapped`).
        alone = {name: candidates[name] for name in trace.first_call if not name.endswith(".base_layer")}
        trace.bypassed = read_elsewhere(model, alone, inputs)
    except Exception as error:
        if example_inputs is not None:
            raise
        kind = type(model).__name__
        logger.warning("the probe of %s failed (%s: %s): %s", kind, type(error).__name__, error, _ADVICE)
        return None
    finally:
        for handle in handles:
            handle.remove()
    return trace


_ADVICE = (
    "layers are ordered by registration, and layers that the model bypasses cannot be found; pass "
    "binarize_model(model, config, example_inputs=...) one small batch to have both right"
)

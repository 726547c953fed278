"""One forward pass before anything is converted: execution order, layers that never run, what feeds which layer."""

import logging
from typing import Any

from torch import nn

from .dataflow import DataFlow
from .running import example_inputs_of, run, untouched
from .weight_readers import read_elsewhere

logger = logging.getLogger(__name__)


def probe(model: nn.Module, candidates: dict[str, nn.Module], example_inputs: Any = None) -> DataFlow | None:
    """Run one batch through the model and note what flows where; then again without hooks, to note whose weight is read
    past its layer. Nothing is left on the model.

    Args:
        model: the unconverted model.
        candidates: the layers to watch, by name.
        example_inputs: keyword arguments, a tuple of arguments, or one tensor; made from the config if None.

    Returns:
        What it saw, or None (with a warning) when no inputs could be made or the model did not run on made-up ones.

    Raises:
        Exception: whatever the model raises on inputs that the caller gave.
    """
    inputs = example_inputs_of(model) if example_inputs is None else example_inputs
    if inputs is None:
        logger.warning("no probe of %s: %s", type(model).__name__, _ADVICE)
        return None
    flow = DataFlow(candidates)
    handles = flow.watch(model)
    try:
        with untouched(model), flow:
            outputs = run(model, inputs)
            flow.close(outputs)
        for handle in handles:
            handle.remove()
        # Adapters that read the weight of the layer that they are around are refused by name (`check_wrapped`).
        alone = {name: candidates[name] for name in flow.called if not name.endswith(".base_layer")}
        flow.bypassed = read_elsewhere(model, alone, inputs, outputs)
    except Exception as error:
        if example_inputs is not None:
            raise
        kind = type(model).__name__
        logger.warning("the probe of %s failed (%s: %s): %s", kind, type(error).__name__, error, _ADVICE)
        return None
    finally:
        for handle in handles:
            handle.remove()
    return flow


_ADVICE = (
    "layers are ordered by registration, and layers that the model bypasses cannot be found; pass "
    "binarize_model(model, config, example_inputs=...) one small batch to have both right"
)

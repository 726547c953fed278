"""One forward pass before anything is converted: execution order, layers that never run, what feeds which layer."""

from typing import Any

from torch import nn

from .dataflow import DataFlow
from .recorder import on_inputs
from .running import untouched
from .weight_readers import read_elsewhere


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

    def look(inputs: Any) -> DataFlow:
        flow = DataFlow(candidates)
        outputs = flow.record(model, inputs, untouched)
        # Adapters that read the weight of the layer that they are around are refused by name (`check_wrapped`).
        alone = {name: candidates[name] for name in flow.called if not name.endswith(".base_layer")}
        flow.bypassed = read_elsewhere(model, alone, inputs, outputs)
        return flow

    return on_inputs(model, example_inputs, look, "probe", _ADVICE)


_ADVICE = (
    "layers are ordered by registration, and layers that the model bypasses cannot be found; pass "
    "binarize_model(model, config, example_inputs=...) one small batch to have both right"
)

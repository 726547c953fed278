"""Who computes with a layer's weight past the layer: hooks cannot show it, since such code may look for hooks first."""

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .dataflow import plain_outputs
from .modules.encoders import module_by_module
from .running import run, untouched


def read_elsewhere(model: nn.Module, layers: dict[str, nn.Module], inputs: Any) -> set[str]:
    """Names of the layers whose weight moves the model's outputs by a way that does not lead through the layer.

    Without hooks, every weight is NaN while its own layer does not run. Outputs that stay what they were show that
    nobody else computes with one; otherwise halves of the layers are looked at, and halves of those. torch's fused
    encoder layers are switched off: they have a class of their own once they hold binary layers (`modules.encoders`).
    """
    before = _outputs(model, inputs)

    def moved(names: list[str]) -> bool:
        after: list[Tensor] = []
        with contextlib.suppress(Exception), _hidden(layers[name] for name in names):
            after = _outputs(model, inputs)  # a model that raises has looked at NaN
        if _same(before, after):
            return False
        return _shows_more_nan(before, after) or _same(before, _outputs(model, inputs))  # or it is never the same

    def among(names: list[str]) -> set[str]:
        if not names or not moved(names):
            return set()
        half = len(names) // 2
        return {*names} if half == 0 else among(names[:half]) | among(names[half:])

    found = among(list(layers))
    if found:
        _outputs(model, inputs)  # what a model keeps of its last run is to come from its own weights
    return found


@contextlib.contextmanager
def _hidden(layers: Iterable[Any]) -> Iterator[None]:
    """Inside the block the layers' weights are NaN, save within their own forward. No number is written."""
    real = {layer: layer.weight.data for layer in layers}
    replaced = {layer: vars(layer).get("forward") for layer in real}
    hidden = {layer: torch.full_like(data.flatten()[:1], torch.nan).expand(data.shape) for layer, data in real.items()}

    def seeing(layer: Any, forward: Any) -> Any:
        def run_layer(*args: Any, **kwargs: Any) -> Any:
            layer.weight.data = real[layer]
            try:
                return forward(*args, **kwargs)
            finally:
                layer.weight.data = hidden[layer]

        return run_layer

    try:
        for layer in real:
            layer.forward = seeing(layer, layer.forward)
            layer.weight.data = hidden[layer]
        yield
    finally:
        for layer, data in real.items():
            layer.weight.data = data
            vars(layer).pop("forward", None)
            if replaced[layer] is not None:
                layer.forward = replaced[layer]


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with contextlib.suppress(Exception):
        inputs = copy.deepcopy(inputs)  # a cache among them grows
    with untouched(model), module_by_module():
        outputs = tree_leaves(plain_outputs(run(model, inputs)))
    return [leaf.clone() for leaf in outputs if isinstance(leaf, Tensor) and not leaf.is_nested]


def _same(before: list[Tensor], after: list[Tensor]) -> bool:
    pairs = zip(before, after, strict=False)
    return len(before) == len(after) and all(torch.equal(left, right) or _equal(left, right) for left, right in pairs)


def _equal(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and bool(((left == right) | left.isnan()).all())


def _shows_more_nan(before: list[Tensor], after: list[Tensor]) -> bool:
    pairs = zip(before, after, strict=False)
    return any(left.shape == right.shape and bool((right.isnan() & ~left.isnan()).any()) for left, right in pairs)

"""Who computes with a layer's weight past the layer: hooks cannot show it, since such code may look for hooks first."""

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modules.subclasses import methods_with_weight
from ..modules.torch_encoder import module_by_module
from .recorder import same, tensors_of
from .running import run, untouched


def read_elsewhere(model: nn.Module, layers: dict[str, nn.Module], inputs: Any, seen: Any) -> set[str]:
    """Names of the layers whose weight moves the model's outputs by a way that does not lead through the layer.

    Without hooks, every weight is NaN while its own layer does not run. Outputs that stay what they were show that
    nobody else computes with one; otherwise halves of the layers are looked at, and halves of those. torch's fused
    encoder layers are switched off: they have a class of their own once they hold binary layers (`torch_encoder`).
    A model that generates, and whose code names a weight, does so as well: with a cache it may go another way.

    Args:
        model: the unconverted model.
        layers: the layers, by name.
        inputs: what it is called with.
        seen: its outputs, as a run with hooks gave them: mostly they are those without.
    """
    decodes = _may_decode_otherwise(model, layers)

    def hidden(names: list[str]) -> list[Tensor]:
        with contextlib.suppress(Exception), _hidden(layers[name] for name in names):
            return _outputs(model, inputs, decodes)
        return []  # a model that raises has looked at NaN

    if not decodes and same(_tensors(seen), hidden(list(layers))):
        return set()
    before = _outputs(model, inputs, decodes)

    def moved(names: list[str]) -> bool:
        after = hidden(names)
        if same(before, after):
            return False
        if _shows_more_nan(before, after):
            return True
        return same(before, _outputs(model, inputs, decodes))  # or it is never the same

    def among(names: list[str]) -> set[str]:
        if not names or not moved(names):
            return set()
        half = len(names) // 2
        return {*names} if half == 0 else among(names[:half]) | among(names[half:])

    return among(list(layers))


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


def _may_decode_otherwise(model: Any, layers: Iterable[str]) -> bool:
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        return False
    around = {type(model.get_submodule(name.rpartition(".")[0])) for name in layers}
    bases = {kind: PreTrainedModel if issubclass(kind, PreTrainedModel) else nn.Module for kind in around}
    return any(name for kind, base in bases.items() for name in methods_with_weight(kind, base))


_TWO_TOKENS = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "num_beams": 1, "use_cache": True}


def _outputs(model: Any, inputs: Any, decodes: bool) -> list[Tensor]:
    with contextlib.suppress(Exception):
        inputs = copy.deepcopy(inputs)  # a cache among them grows
    with untouched(model), module_by_module():
        outputs = _tensors(run(model, inputs))
        with contextlib.suppress(Exception):  # not every model that says so can
            if decodes:
                given = {name: value for name, value in inputs.items() if name != "labels"}
                found = model.generate(**given, **_TWO_TOKENS, return_dict_in_generate=True, output_logits=True)
                outputs += _tensors(found.logits)
    return outputs


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf.clone() for leaf in tensors_of(outputs) if not leaf.is_nested]


def _shows_more_nan(before: list[Tensor], after: list[Tensor]) -> bool:
    pairs = zip(before, after, strict=False)
    return any(left.shape == right.shape and bool((right.isnan() & ~left.isnan()).any()) for left, right in pairs)

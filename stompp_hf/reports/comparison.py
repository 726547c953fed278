"""How far the outputs of two models lie apart: what rounding costs, or that packing costs nothing."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..integrations.torch import tensors_in
from ..surgery.recorder import plain_outputs
from ..surgery.running import example_inputs_of, run, undisturbed

SAMPLES = 16


@dataclass
class Difference:
    """The outputs of one model against another's, on equal inputs.

    largest and mean: of |difference|; spread: standard deviation of the first model's outputs; agreement: share of
    positions at which the largest output is the same one; equal: whether they are equal bit for bit.
    """

    largest: float
    mean: float
    spread: float
    agreement: float
    equal: bool

    def __str__(self) -> str:
        if self.equal:
            return "outputs equal, bit for bit"
        return (
            f"outputs differ by {self.mean:.3g} on average, {self.largest:.3g} at most, where their standard deviation "
            f"is {self.spread:.3g}; the largest one is the same in {self.agreement:.1%}"
        )


def output_difference(left: nn.Module, right: nn.Module, batches: Any = None) -> Difference:
    """Compare what two models compute, in eval mode; neither is changed.

    Args:
        left: a model.
        right: another with outputs of the same shape.
        batches: keyword arguments, tuples or tensors; if None, random inputs are made from the config of `left`.

    Raises:
        ConfigError: no inputs can be made, there are none, or the outputs have different shapes.
    """
    if batches is None:
        batches = [example_inputs_of(left, seed) for seed in range(SAMPLES)]
    batches = [batch for batch in batches if batch is not None]
    if not batches:
        raise ConfigError(
            f"no inputs could be made for a {type(left).__name__}; pass output_difference(left, right, batches) some."
        )
    with undisturbed(left), undisturbed(right):
        pairs = [(_scores(run(left, batch)), _scores(run(right, batch))) for batch in batches]
    for one, other in pairs:
        if one.shape != other.shape:
            raise ConfigError(f"the outputs have the shapes {list(one.shape)} and {list(other.shape)}: compare alike.")
    a, b = (torch.cat([t.double().flatten(0, -2) for t in side]) for side in zip(*pairs, strict=True))
    apart = (a - b).abs()
    return Difference(
        float(apart.max()),
        float(apart.mean()),
        float(a.std()),
        float((a.argmax(-1) == b.argmax(-1)).double().mean()),
        all(torch.equal(one, other) for one, other in pairs),
    )


def _scores(outputs: Any) -> Tensor:
    """The logits, or the first floating-point output of a model without any."""
    found = plain_outputs(outputs)
    if isinstance(found, dict) and isinstance(found.get("logits"), Tensor):
        found = found["logits"]
    scores: Tensor = next(t for t in tensors_in(found) if t.is_floating_point())
    return scores

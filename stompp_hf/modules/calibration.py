"""Starting values of a layer's activation scale, threshold and clip range, from what enters the layer.

An `Observer` watches one layer during the training step in which its stage's window opens (the frozen fraction is 0
then, so the layer still computes with real values), over all its calls and micro-batches; `Progression` turns what it
saw into values before the next step. Not earlier: while the stages in front are still real, the inputs are others.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..integrations.torch import is_in_backward

MAX_ROWS = 2048
"""Rows (positions) kept of one call; more are thinned out evenly."""

RANGE_MARGIN = 0.5
"""Room on each side of the observed range, as a share of it, before unfrozen activations are clipped."""

NO_EDGE = 2.0**100
"""A clip's edge where nothing is clipped. It is finite, for averages of models: infinity less itself is no number."""

ONE_SIDED_PRODUCERS = ("relu", "gelu", "silu", "swish", "mish", "softmax", "sigmoid")


def padding_masks(kwargs: dict[str, object]) -> list[Tensor]:
    """The (batch, positions) attention masks among a model's keyword arguments."""
    found = [kwargs.get("attention_mask"), kwargs.get("decoder_attention_mask")]
    return [mask for mask in found if isinstance(mask, Tensor) and mask.dim() == 2]


@dataclass
class Watch:
    """What all observers of one model know of its forward.

    masks: which positions are padding; trains: whether the model was called for training, also where a part of it runs
    without gradients (activation checkpointing); ran: whether it was called for training at all; by_hand: data are
    shown on purpose, whatever the model is called for.
    """

    masks: list[Tensor] = field(default_factory=list)
    trains: bool = False
    ran: bool = False
    by_hand: bool = False


class Observer:
    """Rows of what entered one layer, one row a position, features last.

    hidden: rows were shown, and all of them so far were padding.
    """

    def __init__(self, watch: Watch | None = None) -> None:
        self.watch = watch or Watch()
        self.rows: list[Tensor] = []
        self.hidden = False
        self._others: dict[str, Observer] = {}

    def looks(self) -> bool:
        """Whether this call is one to learn from: a teacher's or a metric's forward without gradients is not.

        Nor is one inside a backward pass: activation checkpointing recomputes, on data that was seen already.
        """
        return self.watch.by_hand or ((torch.is_grad_enabled() or self.watch.trains) and not is_in_backward())

    def at(self, place: str) -> "Observer":
        """The observer of another tensor of the same module; it knows the same masks."""
        return self._others.setdefault(place, Observer(self.watch))

    def visible(self, places: torch.Size) -> Tensor | None:
        """The positions that are not padding, as a boolean tensor of shape `places`; None if nothing says."""
        for mask in self.watch.masks:
            if tuple(mask.shape) == tuple(places):
                return mask.bool()
        return None

    def seen(self, features: int, like: Tensor) -> Tensor:
        """All rows, (rows, features); none at all where only other processes ran the module."""
        return torch.cat(self.rows) if self.rows else like.detach().new_empty(0, features)

    def see(self, rows: Tensor, places: torch.Size, limit: int = MAX_ROWS) -> None:
        """Keep (at most `limit`, evenly thinned) rows of a call's input, without padded positions if known."""
        with torch.no_grad():
            rows = rows.detach()
            visible = self.visible(places)
            if visible is not None:
                shown = rows.shape[0]
                rows = rows[visible.reshape(-1).to(rows.device)]
                self.hidden = not self.rows and shown > 0 and rows.shape[0] == 0
            if rows.shape[0] == 0:
                return  # an expert without a token, or nothing but padding: not to have run
            self.hidden = False
            stride = -(-max(1, rows.shape[0]) // limit)
            while math.gcd(stride, rows.shape[0]) > 1 < stride:
                stride += 1  # a stride that divides an image's width would look at one column only
            exact = torch.float64 if rows.dtype == torch.float64 else torch.float32
            self.rows.append(rows[::stride].to(exact, copy=True))


@dataclass
class ActivationValues:
    """What a layer needs to binarize its input: a, b, the clip's edges, and the offset in units of a."""

    scale: Tensor
    threshold: Tensor
    low: Tensor
    high: Tensor
    offset: float

    def is_finite(self) -> bool:
        """Whether all of it can be computed with."""
        return all(bool(t.isfinite().all()) for t in (self.scale, self.threshold, self.low, self.high))


def in_processes() -> bool:
    """Whether torch.distributed runs."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def reduced(value: Tensor, how: str = "sum") -> Tensor:
    """Over all ranks when torch.distributed runs, so that equal values come from different data."""
    if in_processes():
        torch.distributed.all_reduce(value, op=getattr(torch.distributed.ReduceOp, how.upper()))
    return value


def one_sided(producer: str | None) -> bool:
    """Whether a module's outputs have one sign, or nearly so, by the name of its class."""
    return producer is not None and any(word in producer.lower() for word in ONE_SIDED_PRODUCERS)


def unseen_values(weight: Tensor, features: int, levels: str, producer: str | None) -> ActivationValues:
    """Values for a layer that no data reached, from its weight: an input of the size that it is made for.

    Forward:  a = sqrt(2 / pi) / (sqrt(features) * rms(w)), the mean size of a normal input whose outputs have
              variance 1; b = 0; {-a, a}, or {0, 2a} with b = a for one-sided inputs; no clip
    Source:   this library's choice.
    """
    size = weight.detach().to(torch.float32).square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    scale = (math.sqrt(2.0 / (math.pi * features)) / size).reshape(1)
    scale = torch.where(scale.isfinite(), scale, torch.ones_like(scale))
    edge = scale.new_full((1,), NO_EDGE)
    if levels == "auto" and one_sided(producer):
        return ActivationValues(scale, scale.expand(features).clone(), -edge, edge, 1.0)
    return ActivationValues(scale, scale.new_zeros(features), -edge, edge, 0.0)


def activation_values(rows: Tensor, threshold: str, levels: str, producer: str | None) -> ActivationValues:
    """Starting values from observed rows.

    Forward:  two-sided input: b = 0 or the mean of each feature, a = mean |u - b|, levels {-a, a};
              one-sided input (levels = "auto", and the input is never negative or comes from a ReLU-like
              activation): levels {0, 2a} with a the threshold of all features, by Lloyd's rule on the rows
              low, high = the observed range, widened by RANGE_MARGIN of it (or of its edges) on each side
    Source:   this library's choice.

    Args:
        rows: (rows, features), real.
        threshold: "none", "zero" or "mean".
        levels: "symmetric" or "auto".
        producer: class name of the module whose output this is, if known.
    """
    count = reduced(torch.tensor(float(rows.shape[0]), dtype=rows.dtype, device=rows.device)).clamp(min=1.0)
    features = rows.shape[1]
    empty = rows.shape[0] == 0
    low = reduced(rows.new_tensor(torch.inf) if empty else rows.min(), "min").reshape(1)
    high = reduced(rows.new_tensor(-torch.inf) if empty else rows.max(), "max").reshape(1)
    widest = torch.stack([high - low, high.abs(), low.abs()]).amax(0)
    margin = RANGE_MARGIN * torch.where(widest > 0, widest, torch.ones_like(widest))
    named = one_sided(producer)
    if levels == "auto" and (named or bool(low >= 0)) and bool(high > 0):
        cut = reduced(rows.clamp(min=0).sum()) / (count * features)
        for _ in range(10):
            above = rows > cut
            total = reduced(torch.stack([(rows * above).sum(), above.sum().to(rows.dtype)]))
            cut = total[0] / total[1].clamp(min=1.0) / 2
        scale = cut.reshape(1)
        return ActivationValues(scale, scale.expand(features).clone(), low - margin, high + margin, 1.0)
    start = reduced(rows.sum(0)) / count if threshold == "mean" else rows.new_zeros(features)
    scale = (reduced((rows - start).abs().sum()) / (count * features)).reshape(1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a constant input must not kill the layer
    return ActivationValues(scale, start, low - margin, high + margin, 0.0)

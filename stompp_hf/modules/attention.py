"""BinaryAttention: the two products inside an attention module, q k^T and p v, with binary operands.

It has no weight and computes what the module around it would have asked its attention implementation for (see
`attention_interface`); the projections before and after it are layers of their own.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import kernels
from ..config import StoMPPConfig
from ..errors import NotCalibratedError
from ..integrations.sharding import assign
from ..integrations.transformers import mark_initialized
from ..method.attention_product import Edges, Operand, binary_matmul
from .calibration import MAX_ROWS, NO_EDGE, Observer, activation_values
from .layer_state import finite_edge
from .stage_member import FROZEN, PENDING, Member, filled

PROJECTED = ("query", "key", "value")
SITES = (*PROJECTED, "probability")

SLOTS = 128
"""Entries of the probabilities' mask for each head; the key at position j has entry j mod SLOTS."""

NOTHING = torch.finfo(torch.float32).tiny
"""A probability of no more than this is none: masks of -100 leave such a rest."""

LEAST = NOTHING * (1 + torch.finfo(torch.float32).eps)
"""The next number: the smallest probability that is one."""

ROWS_OF_PROBABILITIES = 64 * MAX_ROWS
"""A probability is one number for each head, and few of them are large: more are looked at than rows of features."""


@dataclass
class Call:
    """What an attention module passes beside queries, keys and values.

    plain: the original implementation, of (query, key, value); mask: boolean (True: attend) or to be added, or None;
    bias: to be added; softcap: c, for scores that are bent to c * tanh(score / c) before anything is added, as Gemma 2
    has them; causal: whether later keys are excluded where there is no mask; wants_weights: whether the original
    returns the probabilities.
    """

    plain: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
    mask: Tensor | None = None
    bias: Tensor | None = None
    scaling: float | None = None
    softcap: float | None = None
    dropout: float = 0.0
    causal: bool = False
    wants_weights: bool = False


def grouped(x: Tensor, heads: int) -> Tensor:
    """(batch, heads of any kind, ...) as (batch, key heads, heads for each of them, ...)."""
    return x.unsqueeze(1) if x.shape[1] == 1 else x.unflatten(1, (heads, -1))


def beside(scores: torch.Size, call: Call, device: torch.device) -> tuple[list[Tensor], Tensor | None]:
    """What is added to scores of this size, one after the other, and which entries are excluded (None: none).

    Excluded are those whose mask is False, or so low that it can mean nothing else, or that come later than their
    query in a causal call.
    """
    heads, (queries, keys) = scores[1], scores[-2:]
    added = [] if call.bias is None else [grouped(call.bias, heads)]
    if call.mask is not None:
        mask = grouped(call.mask[(None,) * (4 - call.mask.dim())], heads)[..., :keys]
        if mask.dtype == torch.bool:
            return added, ~mask
        return [*added, mask], mask <= torch.finfo(mask.dtype).min / 2
    if call.causal and queries > 1:
        return added, torch.ones(queries, keys, dtype=torch.bool, device=device).triu(1)
    return added, None


def masked(scores: Tensor, added: list[Tensor], excluded: Tensor | None) -> Tensor:
    """scores + what is added, and the lowest number where an entry is excluded."""
    for tensor in added:
        scores = scores + tensor
    return scores if excluded is None else scores.masked_fill(excluded, torch.finfo(scores.dtype).min)


def probabilities(scores: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """softmax(scores + bias + mask), and which entries are excluded (None: none): see `beside`.

    Forward:  p = softmax(scores + bias + mask)
    Shape:    scores and p (batch, key heads, groups, queries, keys)
    """
    added, excluded = beside(scores.shape, call, scores.device)
    return masked(scores, added, excluded).softmax(-1), excluded


def scaling_of(query: Tensor, call: Call) -> float:
    """What products of queries and keys are multiplied by."""
    return float(query.shape[-1] ** -0.5 if call.scaling is None else call.scaling)


def scores_of(products: Tensor, query: Tensor, call: Call) -> Tensor:
    """Scores before anything is added, from the products of queries and keys."""
    scores = products * scaling_of(query, call)
    return scores if call.softcap is None else (scores / call.softcap).tanh() * call.softcap


class BinaryAttention(Member, nn.Module):
    """softmax(q k^T * scaling + mask) v, whose four operands become binary.

    Forward, by state: pending: the original implementation (on clipped q, k, v where activation_clip is set);
    in transition, with u' = `mix_activation(u)`: p = softmax(q' k'^T * scaling + mask), y = (factor * p') v';
    frozen: the same with `binary_matmul`, whose products are exact sums of integers; without a gradient or dropout by
    popcounts where there are kernels (`kernels.attention`), with the same bits but for the sign of a zero.
    q, k and v have the levels {-a, a} and p always {0, 2a}, a one scale a head; thresholds are one a feature, for p one
    a head. factor is 0 where the mask excludes an entry or p is 0 (so that no threshold can bring it back), else
    what dropout makes of p'. Dropout acts on p', so that it does not move p across its threshold.
    Backward: that of the two functions named. p' is never clipped: it lies between 0 and 1.

    Masks: q, k, v one entry a feature, (heads, head size). p: the feature of p' in its product with v' is the position
    of the key, of which there is no fixed number: (heads, SLOTS), and the key at position j has entry j mod SLOTS.

    Extra tensors: {query, key, value, probability}_scale (heads,); {query, key, value}_threshold (heads, head size);
    probability_threshold (heads,); {query, key, value}_low and _high (1,); stompp_state int64 (6,). Keys and values may
    have fewer heads than queries. Without scales (activation_scale="none") p has the levels {0, 1}.

    Raises:
        NotCalibratedError: it is committed and runs before its values were set.
    Source: BiT and BiBERT binarize these products; progressive freezing is Smith and Islam's (2026); this form is this
    library's choice.

    Args:
        config: the options.
        shape: heads, key heads, head size and value size of the attention module.
        like: a tensor of the dtype and on the device that its own are to have.
    """

    mask_names = tuple(f"{site}_mask" for site in SITES)
    own_names = (
        *(f"{site}_{what}" for site in SITES for what in ("scale", "threshold")),
        *(f"{site}_{what}" for site in PROJECTED for what in ("low", "high")),
        "stompp_state",
    )
    edge_names = tuple(f"{site}_{what}" for site in PROJECTED for what in ("low", "high"))
    query_scale: Tensor

    def __init__(self, config: StoMPPConfig, shape: list[int], like: Tensor) -> None:
        super().__init__()
        self.heads, self.key_heads, head_size, value_size = shape
        self.sizes = {"query": head_size, "key": head_size, "value": value_size}
        mark_initialized(self)
        clip = config.activation_clip or NO_EDGE
        learns, fixed = config.learn_activation_threshold, config.activation_threshold == "none"
        for site in PROJECTED:
            features = self._features(site)
            self._own(f"{site}_scale", filled(features[:1], 1.0, like), config.learn_activation_scale)
            self._own(f"{site}_threshold", None if fixed else filled(features, 0.0, like), learns)
            self._own(f"{site}_low", filled((1,), -clip, like))
            self._own(f"{site}_high", filled((1,), clip, like))
        self._own("probability_scale", filled((self.heads,), 0.5, like), config.learn_activation_scale)
        self._own("probability_threshold", filled((self.heads,), 0.5, like), learns)
        self._begin(config, like)
        own = (None, None) if config.activation_clip is None else (-config.activation_clip, config.activation_clip)
        self.edges: dict[str, Edges] = {**dict.fromkeys(PROJECTED, own), "probability": (None, None)}
        self._looked()

    # ---- what reports ask for ----

    plain_kind = "attention products"

    def bits(self) -> tuple[list[int], list[int]]:
        return [], self._bits_of(self.stompp_config.binary_activations, self.like.dtype)

    # ---- what Progression asks for ----

    @property
    def like(self) -> Tensor:
        return self.query_scale

    def masked_tensors(self) -> dict[str, torch.Size]:
        shapes = {f"{site}_mask": self._features(site) for site in PROJECTED}
        return {**shapes, "probability_mask": torch.Size((self.heads, SLOTS))}

    def _features(self, site: str) -> torch.Size:
        return torch.Size((self.heads if site == "query" else self.key_heads, self.sizes[site]))

    @property
    def needs_activation_values(self) -> bool:
        return self.stompp_config.binary_activations

    def calibrate_observed(self, observer: Observer, first_call: bool = False) -> None:
        for site in SITES:
            seen, features = observer.at(site), getattr(self, f"{site}_scale").shape[0] * self.sizes.get(site, 1)
            self._start(site, seen.rows[0] if first_call else seen.seen(features, self.like))
        self._ready()

    def calibrate_unseen(self) -> None:
        """Values for attention that no data reached: operands of size 1, probabilities above a half."""
        self._ready()

    def _ready(self) -> None:
        self.freezing.activation_ready = 1
        self._wrote()

    def _start(self, site: str, rows: Tensor) -> None:
        """Set the values of one operand from rows of (heads * features), head by head."""
        config, scale = self.stompp_config, getattr(self, f"{site}_scale")
        threshold, is_probability = getattr(self, f"{site}_threshold"), site == "probability"
        levels = "auto" if is_probability else "symmetric"
        parts = rows.chunk(scale.shape[0], dim=1)
        found = [activation_values(part, config.activation_threshold, levels, None) for part in parts]
        if is_probability and any(values.offset == 0.0 for values in found):
            return  # nothing was seen
        for values in found:
            self._refuse_infinite(values)
        with torch.no_grad():
            if config.activation_scale != "none":
                assign(scale, torch.cat([values.scale for values in found]))
            if threshold is not None:
                assign(threshold, torch.stack([values.threshold for values in found]).reshape(threshold.shape))
            if not is_probability and config.activation_clip is None:
                getattr(self, f"{site}_low").copy_(torch.cat([values.low for values in found]).amin())
                getattr(self, f"{site}_high").copy_(torch.cat([values.high for values in found]).amax())
        self._wrote()

    def _read_edges(self) -> None:
        def edges(site: str) -> Edges:
            return finite_edge(getattr(self, f"{site}_low")), finite_edge(getattr(self, f"{site}_high"))

        self.edges = {**{site: edges(site) for site in PROJECTED}, "probability": (None, None)}

    # ---- forward ----

    def forward(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
        """y (batch, queries, heads, value size) and the probabilities, or None where the original gives none.

        Args:
            query: (batch, heads, queries, head size); key, value: (batch, key heads, keys, head or value size).
            call: the rest.
        """
        freezing, observer = self.follow(), self.observer
        looks = observer is not None and self.training and observer.looks()
        if looks:
            with torch.no_grad():
                self._look(query, key, value, call)
        waits = looks and not freezing.activation_ready and freezing.stage != FROZEN  # padding alone, so far
        if freezing.stage == PENDING or not freezing.has_frozen or waits:
            clip = self.stompp_config.activation_clip if self.stompp_config.binary_activations else None
            clipped = [u if clip is None else F.hardtanh(u, -clip, clip) for u in (query, key, value)]
            return call.plain(self.with_idle(clipped[0]), *clipped[1:])
        if not freezing.activation_ready:
            raise NotCalibratedError(
                f"BinaryAttention (stage state {freezing.stage}) has no values yet: they are set by the first "
                "training step of its stage. Call stompp_hf.calibrate(model, batches) to set them from data now."
            )
        kind = query.device.type
        mixed = torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if mixed else contextlib.nullcontext():
            return self._attend(query, key, value, call)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
        size = torch.Size((query.shape[0], self.key_heads, self.heads // self.key_heads, query.shape[2], key.shape[2]))
        added, excluded = beside(size, call, query.device)
        y, p = self._by_kernel((query, key, value), call, added, excluded) or (None, None)
        if y is not None and not call.wants_weights:
            return y.to(query.dtype), None
        q, k, v = self._operands(query, key, value)
        if p is None:
            p = masked(scores_of(self._product(q, k.transposed()), query, call), added, excluded).softmax(-1)
        factor = (p.detach() > NOTHING).to(p.dtype)
        factor = factor if excluded is None else factor.masked_fill_(excluded, 0.0)
        factor = F.dropout(factor, call.dropout)
        weights = self._operand("probability", p)
        if y is None:
            y = self._product(weights, v, factor).flatten(1, 2).transpose(1, 2).contiguous()
        if not call.wants_weights:
            return y.to(query.dtype), None
        return y.to(query.dtype), (self._levels(weights) * factor).flatten(1, 2).to(query.dtype)

    def _by_kernel(
        self, operands: tuple[Tensor, Tensor, Tensor], call: Call, added: list[Tensor], excluded: Tensor | None
    ) -> tuple[Tensor, Tensor | None] | None:
        """y and, for its weights, p, from bits; None where plain torch is to compute them."""
        if self.freezing.stage != FROZEN or call.dropout or call.softcap is not None:
            return None
        scales, thresholds = ([getattr(self, f"{site}_{what}") for site in SITES] for what in ("scale", "threshold"))
        scaling = scaling_of(operands[0], call)
        return kernels.attention(
            operands, scales, thresholds, scaling, LEAST, added, excluded, whole=call.wants_weights
        )

    def _operands(self, *operands: Tensor) -> list[Operand]:
        """Queries, keys and values as (batch, key heads, groups, positions, size), in a dtype that sums exactly."""
        exact = torch.float64 if self.like.dtype == torch.float64 else torch.float32
        grouped_ones = (grouped(u, self.key_heads).to(exact) for u in operands)
        return [self._operand(site, u) for site, u in zip(PROJECTED, grouped_ones, strict=True)]

    def _operand(self, site: str, u: Tensor) -> Operand:
        def placed(what: str) -> Any:  # (heads,) or (heads, size), to broadcast over u
            t: Tensor | None = getattr(self, f"{site}_{what}")
            if t is None:
                return None
            if what != "mask":
                t = self.in_units(t, u.shape[-2] * (u.shape[-1] if t.dim() == 1 else 1)).to(u.dtype)
            return t.reshape(self.key_heads, -1, 1, *t.shape[1:] or (1,))

        mask = placed("mask")
        if mask is not None and site == "probability":
            mask = mask[..., torch.arange(u.shape[-1], device=mask.device) % SLOTS]
        edges, offset, width = self.edges[site], float(site == "probability"), self.stompp_config.surrogate_width
        return Operand(u, placed("scale"), placed("threshold"), edges, offset, mask, width)

    def _product(self, left: Operand, right: Operand, factor: Tensor | None = None) -> Tensor:
        """(factor * left') @ right'."""
        if self.freezing.stage == FROZEN:
            return binary_matmul(left, right, self.surrogate, factor)
        levels = self._levels(left)
        return (levels if factor is None else levels * factor).matmul(self._levels(right))

    def _levels(self, operand: Operand) -> Tensor:
        return operand.binary() if self.freezing.stage == FROZEN else operand.mixed(self.surrogate)

    # ---- looking ----

    def _look(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> None:
        """Show the operands to the observer; committed before any window, the first call sets the values at once."""
        observer: Any = self.observer
        begins = self.has_frozen and not self.activation_ready
        for site, u in zip(PROJECTED, (query, key, value), strict=True):
            rows = u.transpose(1, 2).flatten(2)
            observer.at(site).see(rows.flatten(0, 1), rows.shape[:2])
            if begins and observer.at(site).rows:
                self._start(site, observer.at(site).rows[0])
        q, k, _ = self._operands(query, key, value)
        committed = self.has_frozen  # what follows binary queries and keys sees their scores
        products = (q.binary() if committed else q.u).matmul((k.binary() if committed else k.u).transpose(-1, -2))
        p, excluded = probabilities(scores_of(products, query, call), call)
        rows = p.flatten(1, 2).permute(0, 2, 3, 1)  # one a query and key
        seen = torch.ones_like(rows[..., 0], dtype=torch.bool)
        if excluded is not None:
            hidden = excluded.reshape((1,) * (5 - excluded.dim()) + excluded.shape)
            seen = seen & ~hidden.flatten(1, 2).all(1)
        visible = observer.visible(rows.shape[:2])
        if visible is not None:
            seen = seen & visible.to(seen.device)[:, :, None]
        rows = rows[seen]
        observer.at("probability").see(rows, rows.shape[:1], ROWS_OF_PROBABILITIES)
        seen_all = [observer.at(site).rows for site in SITES]
        observer.rows = seen_all[0] if all(seen_all) else []  # Progression asks whether anything was seen
        observer.hidden = observer.at("query").hidden
        if begins and observer.rows:
            self._start("probability", observer.at("probability").rows[0])
            self._ready()

    def extra_repr(self) -> str:
        return f"heads={self.heads}, key_heads={self.key_heads}, {self.stage_state}"

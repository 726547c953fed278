"""The maths of StoMPP on plain tensors: hard, soft, and the masked mix of the two with its gradients.

No modules and no state here. Written with `copysign` and `lerp` instead of `where`, because a masked select
with a random mask costs several plain copies on a CPU, and nothing is saved that the caller does not keep anyway.
Fresh tensors are worked on in place: on a CPU, getting memory for another one costs more than the arithmetic. Where the
compiled part is there, the mixes and their gradients are one pass each, with the same results; sums stay torch's.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import kernels
from ..kernels import training
from ..kernels.training import ABOVE, BOTH, EVERY, FROZEN, INSIDE, PASSING, UNFROZEN
from .mask_bits import mask_as
from .surrogates import Rule, Surrogate

Edge = float | Tensor | None
"""An edge of a clip: a number, a tensor (1,) in compiled graphs, or None for no clip."""


def hard(u: Tensor) -> Tensor:
    """Binary value of each entry, as a new tensor.

    Forward:  hard(u) = sign(u), with sign(0) = sign(-0) = +1
    Backward: none; the mixes below own their gradients.
    Shape and dtype: those of `u` (any float dtype; the sign does not depend on it). A NaN becomes +1 or -1.
    Source:   Smith and Islam (2026); the value at 0 is this library's choice.
    """
    return hard_above(u, None)


def hard_above(u: Tensor, threshold: Tensor | None) -> Tensor:
    """sign(u - b), as a new tensor; `threshold` b, broadcastable to u, or None for 0.

    A difference can be -0 only if b is +0, so b is given a -0 instead: that spares a pass over u.
    """
    if kernels.is_exported():  # copysign is no core operator; and a comparison cannot underflow
        return torch.where(u.detach() >= (0.0 if threshold is None else threshold.detach()), 1.0, -1.0).to(u.dtype)
    if threshold is None:
        fresh = u.detach() + 0.0  # adding 0 turns -0 into +0
    else:
        fresh = u.detach() - torch.rsub(threshold.detach(), 0.0).neg_()
    return torch.copysign(fresh.new_ones(()), fresh, **_into(fresh))


def _into(fresh: Tensor) -> dict[str, Tensor]:
    """Where a result goes: into a fresh tensor, but where somebody listens, as torch.vmap, which takes no `out`."""
    return {"out": fresh} if kernels.is_eager() else {}


def soft(u: Tensor, low: Edge, high: Edge) -> Tensor:
    """Clipped value of each entry.

    Forward:  soft(u) = clip(u, low, high); with both None, u itself
    Source:   Smith and Islam (2026), who clip at -1 and 1.
    """
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        return torch.clamp(u, low.to(u.dtype), high.to(u.dtype))
    return u if low is None else torch.clamp(u, low, high)  # type: ignore[arg-type]


def inside(grad: Tensor, u: Tensor, low: Edge, high: Edge) -> Tensor:
    """g * 1[low < u < high]: the gradient of the clip, 0 at its edges; g itself if there is no clip."""
    if low is None or high is None:
        return grad
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return torch.where((u > low) & (u < high), grad, 0.0)
    return torch.ops.aten.hardtanh_backward(grad, u, low, high)  # type: ignore[no-any-return]


def through_weight(surrogate: Surrogate, grad: Tensor, weight: Tensor, scale: Tensor, clip: Edge) -> Tensor:
    """k * g of frozen weights, for a surrogate that passes anything."""
    if surrogate.weight is Rule.INSIDE:
        return inside(grad, weight, None if clip is None else -clip, clip)
    k = surrogate.of_weight(weight, scale, clip)
    return grad if k is None else grad * k


def through_activation(
    surrogate: Surrogate, grad: Tensor, u: Tensor, threshold: Tensor | None, scale: Tensor, low: Edge, high: Edge,
    width: float,
) -> Tensor:  # fmt: skip
    """k * g of frozen activations, for a surrogate that passes anything; g is overwritten."""
    if surrogate.activation is Rule.INSIDE:
        return inside(grad, u, low, high)
    k = surrogate.of_activation(u, threshold, scale, low, high, width)
    return grad if k is None else grad.mul_(k)


def _through(clipped: Tensor, passed: Tensor | None, mask: Tensor) -> Tensor:
    """(1 - M) * 1[low < u < high] * g + M * k * g, from the two products; exact, since masks hold 0 and 1."""
    if passed is None:
        return clipped * (1.0 - mask)
    return clipped if passed is clipped else torch.lerp(clipped, passed, mask)


def _masked_sum(values: Tensor, mask: Tensor, shape: torch.Size) -> Tensor:
    """Sum of M * values down to `shape`; first over the dimensions along which M does not vary."""
    if torch.broadcast_shapes(mask.shape, shape) == mask.shape:
        return (values.sum_to_size(mask.shape) * mask).sum_to_size(shape)
    return (values * mask).sum_to_size(shape)


class _MixWeight(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, weight: Tensor, scale: Tensor, bits: Tensor, clip: Edge, surrogate: Surrogate
    ) -> Tensor:
        low, high = (None if clip is None else -clip), clip
        in_graph = isinstance(clip, Tensor)
        ctx.save_for_backward(weight, scale, bits, *((low, high) if in_graph else ()))
        ctx.edges, ctx.surrogate = None if in_graph else (low, high), surrogate
        mixed = None if in_graph else training.mix(weight, None, scale, None, bits, _numbers(low, high))
        if mixed is not None:
            return mixed[0]
        levels = hard(weight).mul_(scale)
        mask = mask_as(levels.dtype, bits, weight.shape)
        return torch.lerp(soft(weight, low, high), levels, mask, **_into(levels))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, scale, bits, *edges = ctx.saved_tensors
        edges = edges if ctx.edges is None else ctx.edges
        grad_weight = grad_scale = None
        if not isinstance(edges[0], Tensor):
            made = _fast_weight_backward(grad, weight, bits, edges, ctx.surrogate.weight, *ctx.needs_input_grad[:2])
            if made is not None:
                terms = made[1]
                return made[0], None if terms is None else terms.sum_to_size(scale.shape), None, None, None
        mask = mask_as(weight.dtype, bits, weight.shape)
        if ctx.needs_input_grad[0]:
            clipped = inside(grad, weight, *edges)
            passed = None
            if ctx.surrogate.passes:
                alike = ctx.surrogate.weight is Rule.INSIDE
                passed = clipped if alike else through_weight(ctx.surrogate, grad, weight, scale, edges[1])
            grad_weight = _through(clipped, passed, mask)
        if ctx.needs_input_grad[1]:
            grad_scale = _masked_sum(hard(weight).mul_(grad), mask, scale.shape)
        return grad_weight, grad_scale, None, None, None


def _fast_weight_backward(
    grad: Tensor, weight: Tensor, bits: Tensor, edges: Any, known: Any, wants_weight: bool, wants_scale: bool
) -> tuple[Tensor | None, Tensor | None] | None:
    """The weight's gradient and M * g * sign(w) in compiled C; None where plain torch is to do it."""
    if known is None and wants_weight:
        return None
    clip = None if edges[0] is None else edges
    passes_all = clip is None and known is not Rule.NOTHING
    rule = {Rule.NOTHING: UNFROZEN, Rule.INSIDE: EVERY}.get(known, BOTH) if wants_weight and not passes_all else None
    made = training.mix_weight_backward(grad, weight, bits, clip, rule, wants_scale)
    return (grad, made[1]) if made is not None and wants_weight and passes_all else made


def _numbers(low: Any, high: Any) -> tuple[float, float]:
    """The edges of a clip as numbers, infinite ones for no clip."""
    return (-math.inf, math.inf) if low is None else (low, high)


def mix_weight(weight: Tensor, scale: Tensor, bits: Tensor, clip: Edge, surrogate: Surrogate) -> Tensor:
    """Weight of a stage in transition: frozen entries binary, the others real.

    Forward:  w' = M * s * sign(w) + (1 - M) * clip(w, -c, c)
    Backward: dL/dw = (1 - M) * g * 1[-c < w < c] + M * k * g, g = dL/dw'
              k as the surrogate says: `Surrogate.of_weight`; never multiplied by the scale
              dL/ds = sum of M * g * sign(w) over the entries that share s
    Source:   Smith and Islam (2026) for s = c = 1; scale, clip range and the clipped surrogate are this library's.

    Args:
        weight: latent weight, any shape, float.
        scale: s, broadcastable to `weight` ((out, 1) for a linear layer), float.
        bits: M, one an entry of `weight`, as bits: see `mask_bits.pack_mask`.
        clip: c, or None for no clip.
        surrogate: what frozen entries pass back.
    """
    return kernels.apply(_MixWeight, weight, scale, bits, clip, surrogate)


class _MixActivation(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        u: Tensor,
        real: Tensor | None,
        scale: Tensor,
        threshold: Tensor | None,
        mask: Tensor,
        low: Edge,
        high: Edge,
        offset: float,
        surrogate: Surrogate,
        width: float,
    ) -> Tensor:
        wants_u, wants_real, wants_scale, wants_threshold = ctx.needs_input_grad[:4]
        absorbed = real is not None
        # What the backward pass asks of u is three bits an entry: they are kept in a byte, and u is not.
        flags = ABOVE if wants_scale else 0
        if low is not None and (wants_real if absorbed else wants_u):
            flags |= INSIDE
        known, wants_k, factor = surrogate.activation, wants_u or wants_threshold, None
        window = width if known is Rule.NEAR else None
        clipped_apart = known is Rule.INSIDE and low is not None and (absorbed or not wants_u)
        if clipped_apart or (window is not None and wants_k):
            flags |= PASSING
        if known is None and wants_k:
            factor = surrogate.of_activation(u, threshold, scale, low, high, width)
        mixed = None
        if not isinstance(low, Tensor):
            mixed = training.mix(u, real, scale, threshold, mask, _numbers(low, high), offset, flags, window)
        y, code = mixed or _mixed(u, real, scale, threshold, mask, low, high, offset, flags, surrogate, width)
        ctx.save_for_backward(scale, threshold, mask, code, factor)
        ctx.flags, ctx.offset, ctx.surrogate, ctx.absorbed = flags, offset, surrogate, absorbed
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scale, threshold, mask, code, factor = ctx.saved_tensors
        wants_u, wants_real, wants_scale, wants_threshold = ctx.needs_input_grad[:4]
        flags, surrogate, passes = ctx.flags, ctx.surrogate, ctx.surrogate.passes
        # Frozen entries pass nothing, what their flag or their factor says, what unfrozen ones do, or everything.
        apart = bool(flags & PASSING) or factor is not None
        alike = not apart and not ctx.absorbed and (surrogate.activation is Rule.INSIDE or not flags & INSIDE)
        rule = None
        if wants_u and ctx.absorbed:
            rule = FROZEN if passes else None
        elif wants_u:
            rule = UNFROZEN if not passes else EVERY if alike else BOTH
        wanted = (flags, rule, wants_real, ctx.offset if wants_scale else None, wants_threshold and apart)
        made = training.mix_backward(grad, code, mask, *wanted) if factor is None else None
        grad_u, grad_real, scale_terms, passed = made or _mixed_backward(grad, code, factor, mask, *wanted)
        grad_scale = grad_threshold = None
        if scale_terms is not None:
            grad_scale = _masked_sum(scale_terms, mask, scale.shape)
        if wants_threshold and passes:
            terms = passed if passed is not None else grad_u if alike and grad_u is not None else grad
            grad_threshold = -_masked_sum(terms, mask, threshold.shape)
        return grad_u, grad_real, grad_scale, grad_threshold, *[None] * 6


def _mixed(
    u: Tensor, real: Tensor | None, scale: Tensor, threshold: Tensor | None, mask: Tensor, low: Edge, high: Edge,
    offset: float, flags: int, surrogate: Surrogate, width: float,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What `training.mix` gives, in plain torch."""
    levels = hard_above(u, threshold)
    unfrozen = u if real is None else real
    found: dict[int, Tensor] = {}
    if flags & ABOVE:
        found[ABOVE] = levels > 0
    if flags & INSIDE:
        found[INSIDE] = (unfrozen > low) & (unfrozen < high)  # type: ignore[operator]
    if flags & PASSING:
        found[PASSING] = surrogate.of_activation(u, threshold, scale, low, high, width)  # type: ignore[assignment]
    levels = levels.add_(offset).mul_(scale) if offset else levels.mul_(scale)
    return torch.lerp(soft(unfrozen, low, high), levels, mask.to(levels.dtype), **_into(levels)), _packed(found)


def _mixed_backward(
    grad: Tensor, code: Any, factor: Tensor | None, mask: Tensor, flags: int, rule: int | None, real: bool,
    terms: float | None, passes: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """What `training.mix_backward` gives, in plain torch; `factor` is k where no flag says it."""
    mask = mask.to(grad.dtype)
    clipped = grad * (code & INSIDE).ne(0) if flags & INSIDE else grad
    k = (code & PASSING).ne(0) if flags & PASSING else factor
    passed = grad if k is None else grad * k
    makers: dict[int | None, Callable[[], Tensor]] = {
        UNFROZEN: lambda: clipped * (1.0 - mask),
        EVERY: lambda: clipped,
        BOTH: lambda: torch.lerp(clipped, passed, mask),
        FROZEN: lambda: passed * mask,
    }
    scale_terms = None
    if terms is not None:
        scale_terms = (code & ABOVE).to(grad.dtype).mul_(2.0 / ABOVE).add_(terms - 1.0).mul_(grad)
    return (
        None if rule is None else makers[rule](),
        makers[UNFROZEN]() if real else None,
        scale_terms,
        passed if passes else None,
    )


def _packed(flags: dict[int, Tensor]) -> Tensor | None:
    """Booleans as the bits of one byte an entry; None without any."""
    code: Tensor | None = None
    for bit, flag in flags.items():
        part = flag.view(torch.uint8)
        part = part * bit if bit > 1 else part
        code = part if code is None else code.bitwise_or_(part)
    return code


def mix_activation(
    u: Tensor, scale: Tensor, threshold: Tensor | None, mask: Tensor, low: Edge, high: Edge, offset: float,
    surrogate: Surrogate, real: Tensor | None = None, width: float = 1.0,
) -> Tensor:  # fmt: skip
    """Input of a layer of a stage in transition: frozen features binary, the others real.

    Forward:  u' = M * (o + a * sign(u - b)) + (1 - M) * clip(u, low, high), with o = offset * a
              offset 0 gives the levels {-a, a}, offset 1 gives {0, 2a}
    Backward: dL/du = (1 - M) * g * 1[low < u < high] + M * k * g, g = dL/du'
              dL/da = sum of M * g * (sign(u - b) + offset);  dL/db = - sum of M * k * g
              with an absorbed activation f, clip(f(u), low, high) stands in the soft branch, and its gradient goes to
              f(u) alone; the binary value is that of u, the value before f, which gets the surrogate gradient
              k as the surrogate says: `Surrogate.of_activation`; STE-free, b gets no gradient and keeps its
              calibrated value
    Source:   Smith and Islam (2026) for a = high = 1, low = -1, b = o = 0; the rest is this library's choice.

    Args:
        u: input, any shape, float.
        scale: a, broadcastable to `u`.
        threshold: b, broadcastable to `u`, or None for 0.
        mask: M, broadcastable to `u`, booleans.
        low, high: clip range; both None for no clip.
        offset: 0.0 or 1.0, in units of the scale.
        surrogate: what frozen features pass back.
        real: f(u), what unfrozen features compute with, if not u itself.
        width: `surrogate_width`, in units of the scale.
    """
    return kernels.apply(_MixActivation, u, real, scale, threshold, mask.bool(), low, high, offset, surrogate, width)

"""BinaryAttention by itself: products and gradients against the slow reference, exactness, masks, starting values."""

import dataclasses
import math
from typing import Any

import pytest
import reference
import torch
from torch import Tensor

from stompp_hf import BinaryAttention, StoMPPConfig
from stompp_hf.errors import NotCalibratedError
from stompp_hf.method.attention_product import Operand, binary_matmul
from stompp_hf.method.surrogates import SURROGATES
from stompp_hf.modules import FROZEN, PENDING, TRANSITION, attention
from stompp_hf.modules.attention import PROJECTED, SITES, Call
from stompp_hf.modules.calibration import Observer

BATCH, QUERIES, KEYS, SIZE, VALUE_SIZE = 2, 3, 5, 4, 3
SHAPES = [[2, 2, SIZE, VALUE_SIZE], [4, 2, SIZE, VALUE_SIZE]]  # the same heads, and two query heads a key head
FIXED = {"learn_activation_scale": False, "learn_activation_threshold": False}
NONE = {"activation_scale": "none", "activation_threshold": "none", "activation_levels": "symmetric", **FIXED}
INF = math.inf


def operands(shape: list[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys and values, with zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    heads, key_heads, size, value_size = shape
    sizes = [(heads, QUERIES, size), (key_heads, KEYS, size), (key_heads, KEYS, value_size)]
    tensors = [torch.randn(BATCH, *size, generator=generator, dtype=dtype) for size in sizes]
    for tensor in tensors:
        tensor[0, 0, 0, :2] = torch.tensor([0.0, -0.0])
    return tensors


def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
    raise AssertionError("the original implementation is for pending attention")


def allowed() -> Tensor:
    """Key 3 is padding in the first sample, and in the second everything is hidden from the first query."""
    mask = torch.ones(BATCH, 1, QUERIES, KEYS, dtype=torch.bool)
    mask[0, :, :, 3] = False
    mask[1, :, 0, :] = False
    return mask


LOWEST = torch.finfo(torch.float32).min
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "boolean": {"mask": allowed()},
    "lowest": {"mask": torch.where(allowed(), 0.0, LOWEST)},
    "infinite": {"mask": torch.where(allowed(), 0.0, -INF)},
    "causal": {"causal": True},
    "bias": {"bias": torch.linspace(-1, 1, QUERIES * KEYS, dtype=torch.float64).reshape(1, 1, QUERIES, KEYS)},
}


def biases(kind: str) -> Tensor:
    """What is added to the scores, (batch, queries, keys); -inf where an entry is excluded."""
    if kind == "none":
        return torch.zeros(BATCH, QUERIES, KEYS)
    if kind == "causal":
        return torch.full((QUERIES, KEYS), -INF).triu(1).expand(BATCH, -1, -1)
    if kind == "bias":
        return MASKS["bias"]["bias"][0].expand(BATCH, -1, -1)
    return torch.where(allowed(), 0.0, -INF)[:, 0]


def build(shape: list[int], **options: Any) -> BinaryAttention:
    """Calibrated on its own operands, thresholds shifted so that each has a value of its own."""
    config = StoMPPConfig(attention="binarize", **options)
    module = BinaryAttention(config, shape, torch.zeros(1, dtype=torch.float64))
    module.observer = observer = Observer()
    module(*operands(shape, 1), Call(lambda q, k, v: (q, None)))
    module.observer = None
    module.calibrate_observed(observer)
    with torch.no_grad():
        for site in SITES:
            threshold = getattr(module, f"{site}_threshold")
            if threshold is not None and options.get("activation_threshold") != "none":
                threshold += 0.05 * torch.linspace(-1, 1, threshold.numel()).reshape(threshold.shape)
    return module


def freeze(module: BinaryAttention, state: str, share: float = 0.5) -> None:
    module.enter(state, 1.0 if state == FROZEN else 0.5)
    generator = torch.Generator().manual_seed(7)
    for name, shape in module.masked_tensors().items():
        if state == TRANSITION:
            setattr(module, name, torch.rand(shape, generator=generator) < share)


def expected(module: BinaryAttention, tensors: list[Tensor], kind: str, scaling: float, g: Tensor) -> dict[str, Any]:
    """The reference's outputs and gradients, head by head."""
    heads, key_heads, regime = module.heads, module.key_heads, module.stompp_config.frozen_gradient
    groups = heads // key_heads
    found: dict[str, Any] = {"y": torch.zeros_like(g), "weights": torch.zeros(BATCH, heads, QUERIES, KEYS).double()}
    found |= {site: torch.zeros_like(t) for site, t in zip(PROJECTED, tensors, strict=True)}
    for site in SITES:
        for what in ("scale", "threshold"):
            tensor = getattr(module, f"{site}_{what}")
            found[f"{site}_{what}"] = None if tensor is None else torch.zeros_like(tensor)

    def site_of(site: str, n: int, head: int) -> reference.Site:
        probability = site == "probability"
        u = [[0.0] * KEYS] if probability else tensors[SITES.index(site)][n, head].tolist()
        columns = len(u[0])
        mask, b = getattr(module, f"{site}_mask"), getattr(module, f"{site}_threshold")
        mask = [1.0] * columns if mask is None else mask[head].tolist()
        b = [0.0] * columns if b is None else b[head].expand(columns).tolist()
        edges = (-INF, INF) if probability else tuple(getattr(module, f"{site}_{e}").item() for e in ("low", "high"))
        mask = [mask[j % attention.SLOTS] for j in range(columns)] if probability else mask
        a = getattr(module, f"{site}_scale")[head].item()
        return reference.Site(u, a, b, mask, *edges, float(probability), abs(a) * module.stompp_config.surrogate_width)

    for n in range(BATCH):
        for head in range(heads):
            own = {site: head // groups if site in ("key", "value") else head for site in SITES}
            sites = [site_of(site, n, own[site]) for site in SITES]
            y, weights, grads = reference.attention(
                *sites, scaling, biases(kind)[n].tolist(), g[n, :, head].tolist(), regime
            )
            found["y"][n, :, head] = exactly(y)
            found["weights"][n, head] = exactly(weights)
            for site, (grad_u, grad_a, grad_b) in grads.items():
                if site != "probability":
                    found[site][n, own[site]] += exactly(grad_u)
                found[f"{site}_scale"][own[site]] += grad_a
                if found[f"{site}_threshold"] is not None:
                    grad = exactly(grad_b)
                    found[f"{site}_threshold"][own[site]] += grad.sum() if site == "probability" else grad
    return found


def exactly(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def assert_close(actual: Tensor | None, wanted: Tensor) -> None:
    """To 1e-12 of the largest entry; an undefined gradient is a zero one."""
    actual = torch.zeros_like(wanted) if actual is None else actual.detach()
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12 * max(1.0, wanted.abs().max().item()))


@pytest.mark.parametrize("options", [{}, FIXED, {"activation_clip": 0.7}, NONE], ids=["learn", "fixed", "clip", "none"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=["heads", "grouped"])
@pytest.mark.parametrize("state", [TRANSITION, FROZEN])
@pytest.mark.parametrize("surrogate", ["zero", "ste", "clipped_ste", "windowed_ste"])
def test_products_and_gradients(surrogate, state, shape, kind, options, monkeypatch):
    monkeypatch.setattr(attention, "SLOTS", 3)  # fewer than keys
    module = build(shape, frozen_gradient=surrogate, **options)
    freeze(module, state)
    tensors = [tensor.requires_grad_() for tensor in operands(shape)]
    call = Call(plain, scaling=0.9, wants_weights=True, **MASKS[kind])
    y, weights = module(*tensors, call)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    y.backward(g)
    wanted = expected(module, tensors, kind, 0.9, g)
    assert_close(y, wanted["y"])
    assert_close(weights, wanted["weights"])
    assert wanted["y"].abs().max() > 0.1
    for site, tensor in zip(PROJECTED, tensors, strict=True):
        assert_close(tensor.grad, wanted[site])
    for name, tensor in module.named_parameters():
        assert_close(tensor.grad, wanted[name])
    learns = 0 if options in (FIXED, NONE) else 8
    assert len(list(module.parameters())) == learns
    if state == FROZEN and surrogate == "zero":
        assert [tensor.grad for tensor in tensors] == [None] * 3  # undefined, not zeros


@pytest.mark.parametrize("shape", SHAPES, ids=["heads", "grouped"])
def test_frozen_is_the_end_of_the_transition(shape):
    module, tensors = build(shape), operands(shape)
    freeze(module, TRANSITION, share=1.1)
    last, _ = module(*tensors, Call(plain))
    freeze(module, FROZEN)
    assert module.query_mask is None and module.probability_mask is None
    torch.testing.assert_close(module(*tensors, Call(plain))[0], last, rtol=1e-13, atol=1e-13)


def test_a_product_of_signs_is_exact_in_float32():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(3, 7, 2000, generator=generator), torch.randn(3, 2000, 9, generator=generator)
    scales = torch.rand(2, 3, 1, 1, generator=generator)
    threshold = torch.randn(2000, generator=generator)
    none = (None, None)
    for offset in (0.0, 1.0):
        y = binary_matmul(
            Operand(left, scales[0], threshold, none, offset), Operand(right, scales[1], None, none), SURROGATES["ste"]
        )
        signs = torch.where(left >= threshold, 1, -1) + int(offset), torch.where(right >= 0, 1, -1)
        whole = signs[0].to(torch.int64) @ signs[1].to(torch.int64)
        assert torch.equal(y, whole.float() * (scales[0] * scales[1]))


@pytest.mark.parametrize("kind", ["boolean", "lowest", "infinite", "hundred", "causal"])
@pytest.mark.parametrize("state", [TRANSITION, FROZEN])
def test_no_threshold_brings_back_what_a_mask_excludes(kind, state):
    module = build(SHAPES[0])
    with torch.no_grad():
        module.probability_threshold.fill_(-1.0)
    freeze(module, state, share=1.1)
    hidden = {"hundred": {"mask": torch.where(allowed(), 0.0, -120.0)[:1]}}
    call = Call(plain, wants_weights=True, **{**MASKS, **hidden}[kind])
    _, weights = module(*operands(SHAPES[0]), call)
    excluded = torch.isinf(biases("causal" if kind == "causal" else "boolean"))[:, None].expand_as(weights)
    excluded = excluded[:1].expand_as(weights) if kind == "hundred" else excluded
    top = 2 * module.probability_scale.detach().reshape(1, -1, 1, 1).expand_as(weights)
    assert excluded.any() and (weights[excluded] == 0).all()
    assert torch.allclose(weights[~excluded], top[~excluded], rtol=1e-15)


def test_dropout_acts_on_binary_probabilities():
    module, tensors = build(SHAPES[0]), operands(SHAPES[0])
    freeze(module, FROZEN)
    _, whole = module(*tensors, Call(plain, wants_weights=True))
    torch.manual_seed(0)
    _, dropped = module(*tensors, Call(plain, wants_weights=True, dropout=0.5))
    ratio = dropped[whole > 0] / whole[whole > 0]
    assert set(ratio.tolist()) == {0.0, 2.0} and (dropped[whole == 0] == 0).all()


# ---- starting values ----


def test_values_come_from_what_was_seen_and_padding_is_not_seen():
    shape = SHAPES[0]
    module = BinaryAttention(StoMPPConfig(attention="binarize"), shape, torch.zeros(1))
    module.observer = observer = Observer()
    visible = torch.ones(BATCH, KEYS, dtype=torch.bool)
    visible[0, 3:] = False
    observer.watch.masks = [visible.long()]
    q, k, v = operands([2, 2, SIZE, VALUE_SIZE], 1, torch.float32)
    k[0, :, 3:], v[0, :, 3:] = 1e3, 1e3
    module(q, k, v, Call(lambda q, k, v: (v, None), mask=visible[:, None, None, :]))
    module.calibrate_observed(observer)
    for site, u in (("query", q), ("key", k), ("value", v)):
        for head in range(2):
            rows = u[:, head].flatten(0, 1) if site == "query" else u[:, head][visible]
            scale = getattr(module, f"{site}_scale")[head].item()
            assert math.isclose(scale, rows.abs().mean(), rel_tol=1e-6)
        assert torch.count_nonzero(getattr(module, f"{site}_threshold")) == 0
        low, high = getattr(module, f"{site}_low").item(), getattr(module, f"{site}_high").item()
        assert -10 < low < -1 < 1 < high < 10
    scores = q @ k.transpose(-1, -2) * SIZE**-0.5
    p = scores.masked_fill(~visible[:, None, None, :], -INF).softmax(-1)
    for head in range(2):  # Lloyd's rule: the upper level is the mean of what lies above the threshold, half of it
        seen = torch.cat([p[0, head, :, :3].flatten(), p[1, head].flatten()])
        cut = module.probability_threshold[head].item()
        assert math.isclose(module.probability_scale[head].item(), cut)
        assert math.isclose(2 * cut, seen[seen > cut].mean(), rel_tol=1e-5)


def test_committed_attention_takes_the_first_values_that_it_sees():
    module, tensors = BinaryAttention(StoMPPConfig(attention="binarize"), SHAPES[1], torch.zeros(1).double()), None
    tensors = operands(SHAPES[1])
    module.enter(FROZEN, 1.0)
    with pytest.raises(NotCalibratedError, match=r"calibrate\(model, batches\)"):
        module(*tensors, Call(plain))
    module.observer = Observer()
    module(*tensors, Call(plain))
    assert module.activation_ready
    q, k = tensors[0].unflatten(1, (2, 2)), tensors[1].unsqueeze(2)
    scores = torch.where(q >= 0, 1, -1).double() @ torch.where(k >= 0, 1, -1).double().transpose(-1, -2)
    scale = module.query_scale.reshape(2, 2, 1, 1) * module.key_scale.reshape(2, 1, 1, 1)
    p = (scores * scale * SIZE**-0.5).softmax(-1).flatten(1, 2).detach()  # of binary queries and keys
    for head in range(4):
        cut = module.probability_threshold[head].item()
        assert math.isclose(2 * cut, p[:, head][p[:, head] > cut].mean(), rel_tol=1e-9)


def test_without_scales_probabilities_are_zero_or_one():
    module = build(SHAPES[0], **NONE)
    freeze(module, FROZEN)
    _, weights = module(*operands(SHAPES[0]), Call(plain, wants_weights=True))
    assert set(weights.unique().tolist()) == {0.0, 1.0}
    assert not list(module.parameters()) and module.query_threshold is None


def test_pending_attention_is_the_original_one_on_clipped_operands():
    def original(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([u.flatten() for u in (q, k, v)]), k

    tensors = operands(SHAPES[0])
    for clip in (None, 0.5):
        module = BinaryAttention(StoMPPConfig(attention="binarize", activation_clip=clip), SHAPES[0], torch.zeros(1))
        assert module.stage_state == PENDING
        bound = INF if clip is None else clip
        wanted = torch.cat([u.clamp(-bound, bound).flatten() for u in tensors])
        assert torch.equal(module(*tensors, Call(original))[0], wanted)


def test_it_moves_with_its_masks():
    module = build(SHAPES[0])
    freeze(module, TRANSITION)
    module.to(torch.float32)
    assert module.query_mask.dtype == module.probability_mask.dtype == torch.bool
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = module(*(u.bfloat16() for u in operands(SHAPES[0])), Call(plain))
    assert y.dtype == torch.bfloat16 and torch.isfinite(y).all()


def test_scores_bend_below_a_cap():
    module = build(SHAPES[1])
    freeze(module, FROZEN)
    tensors = operands(SHAPES[1])
    call = Call(plain, scaling=5.0, softcap=0.5, wants_weights=True)
    q, k, _ = (operand.binary() for operand in module._operands(*tensors))
    p = (0.5 * torch.tanh(5.0 * q.matmul(k.transpose(-1, -2)) / 0.5)).softmax(-1).flatten(1, 2)
    a, b = (getattr(module, f"probability_{what}").detach()[:, None, None] for what in ("scale", "threshold"))
    with torch.no_grad():
        weights = module(*tensors, call)[1]
        uncapped = module(*tensors, dataclasses.replace(call, softcap=None))[1]
    torch.testing.assert_close(weights, torch.where(p >= b, 2 * a, 0.0))
    assert not torch.equal(weights, uncapped)

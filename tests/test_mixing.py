"""hard, soft and the two mixes: values and gradients against tables and against the slow reference."""

import math
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from stompp_hf.method.mask_bits import pack_mask
from stompp_hf.method.mixing import hard, inside, mix_activation, mix_weight, soft
from stompp_hf.method.surrogates import SURROGATES as NAMED

SURROGATES = ("zero", "ste", "clipped_ste", "windowed_ste")
WIDTH = 1.5
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_bits(actual: Tensor, expected: Any) -> None:
    """Equal bit for bit, but for the sign of a zero, which no update of a parameter can tell."""
    wanted = f64(expected)
    assert actual.dtype == torch.float64 and actual.shape == wanted.shape
    assert torch.equal(actual, wanted), (actual, wanted)


def assert_reduced(actual: Tensor, expected: Any) -> None:
    """To 1e-12 relative, or absolute where the terms cancel."""
    torch.testing.assert_close(actual, f64(expected).reshape(actual.shape), rtol=1e-12, atol=1e-12)


# ---- tables ----

# With s = 0.5 and c = 1: input, mask, value, gradient under each of SURROGATES for dL/dw' = 3.
WEIGHT_TABLE = [
    (0.0, 0, 0.0, 3.0, 3.0, 3.0, 3.0),
    (-0.0, 0, 0.0, 3.0, 3.0, 3.0, 3.0),
    (0.25, 0, 0.25, 3.0, 3.0, 3.0, 3.0),
    (-0.25, 0, -0.25, 3.0, 3.0, 3.0, 3.0),
    (1.0, 0, 1.0, 0.0, 0.0, 0.0, 0.0),
    (-1.0, 0, -1.0, 0.0, 0.0, 0.0, 0.0),
    (math.nextafter(1.0, 0.0), 0, math.nextafter(1.0, 0.0), 3.0, 3.0, 3.0, 3.0),
    (7.0, 0, 1.0, 0.0, 0.0, 0.0, 0.0),
    (-7.0, 0, -1.0, 0.0, 0.0, 0.0, 0.0),
    (0.0, 1, 0.5, 0.0, 3.0, 3.0, 3.0),
    (-0.0, 1, 0.5, 0.0, 3.0, 3.0, 3.0),
    (5e-324, 1, 0.5, 0.0, 3.0, 3.0, 3.0),
    (-5e-324, 1, -0.5, 0.0, 3.0, 3.0, 3.0),
    (0.25, 1, 0.5, 0.0, 3.0, 3.0, 3.0),
    (1.0, 1, 0.5, 0.0, 3.0, 0.0, 3.0),
    (-1.0, 1, -0.5, 0.0, 3.0, 0.0, 3.0),
    (7.0, 1, 0.5, 0.0, 3.0, 0.0, 3.0),
    (-7.0, 1, -0.5, 0.0, 3.0, 0.0, 3.0),
]

# With a = 0.5, b = 0.25, lo = -1, hi = 2, window (-0.5, 1): input, mask, offset, value, gradients as above.
ACTIVATION_TABLE = [
    (0.0, 0, 0.0, 0.0, 3.0, 3.0, 3.0, 3.0),
    (2.0, 0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0),
    (-1.0, 0, 1.0, -1.0, 0.0, 0.0, 0.0, 0.0),
    (1.5, 0, 1.0, 1.5, 3.0, 3.0, 3.0, 3.0),
    (9.0, 0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0),
    (-9.0, 0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0),
    (0.25, 1, 0.0, 0.5, 0.0, 3.0, 3.0, 3.0),
    (0.25, 1, 1.0, 1.0, 0.0, 3.0, 3.0, 3.0),
    (0.0, 1, 0.0, -0.5, 0.0, 3.0, 3.0, 3.0),
    (-0.0, 1, 1.0, 0.0, 0.0, 3.0, 3.0, 3.0),
    (2.0, 1, 0.0, 0.5, 0.0, 3.0, 0.0, 0.0),
    (-1.0, 1, 1.0, 0.0, 0.0, 3.0, 0.0, 0.0),
    (9.0, 1, 1.0, 1.0, 0.0, 3.0, 0.0, 0.0),
    (1.0, 1, 0.0, 0.5, 0.0, 3.0, 3.0, 0.0),
    (math.nextafter(1.0, 0.0), 1, 0.0, 0.5, 0.0, 3.0, 3.0, 3.0),
    (-0.5, 1, 0.0, -0.5, 0.0, 3.0, 3.0, 0.0),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_hard_table(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    u = torch.tensor([0.0, -0.0, tiny, -tiny, 1.0, -1.0, math.inf, -math.inf], dtype=dtype)
    assert hard(u).tolist() == [1.0, 1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0]
    assert hard(u).dtype == dtype
    assert hard(u).data_ptr() != u.data_ptr()


def test_soft_and_inside_table() -> None:
    u, low, high = f64([-2.0, -1.0, -0.5, 0.0, 1.5, 2.0, 3.0]), -1.0, 2.0
    grad = torch.full_like(u, 3.0)
    assert soft(u, low, high).tolist() == [-1.0, -1.0, -0.5, 0.0, 1.5, 2.0, 2.0]
    assert inside(grad, u, low, high).tolist() == [0.0, 0.0, 3.0, 3.0, 3.0, 0.0, 0.0]
    assert soft(u, None, None) is u
    assert inside(grad, u, None, None) is grad


@pytest.mark.parametrize("kind", SURROGATES)
@pytest.mark.parametrize("row", WEIGHT_TABLE, ids=str)
def test_weight_table(row: tuple[float, ...], kind: str) -> None:
    value, mask, expected, *gradients = row
    weight, scale = f64([[value]]).requires_grad_(), f64([[0.5]]).requires_grad_()
    out = mix_weight(weight, scale, pack_mask(f64([[mask]])), 1.0, NAMED[kind])
    out.backward(f64([[3.0]]))
    assert out.item() == expected
    assert weight.grad.item() == gradients[SURROGATES.index(kind)]
    assert scale.grad.item() == (math.copysign(3.0, expected) if mask else 0.0)


@pytest.mark.parametrize("kind", SURROGATES)
@pytest.mark.parametrize("row", ACTIVATION_TABLE, ids=str)
def test_activation_table(row: tuple[float, ...], kind: str) -> None:
    value, mask, offset, expected, *gradients = row
    u, scale, threshold = (f64([v]).requires_grad_() for v in (value, 0.5, 0.25))
    out = mix_activation(u, scale, threshold, f64([mask]), -1.0, 2.0, offset, NAMED[kind], width=WIDTH)
    out.backward(f64([3.0]))
    gradient = gradients[SURROGATES.index(kind)]
    assert out.item() == expected
    assert u.grad.item() == gradient
    assert scale.grad.item() == (3.0 * expected / 0.5 if mask else 0.0)
    if kind == "zero":
        assert threshold.grad is None
    else:
        assert threshold.grad.item() == (-gradient if mask else 0.0)


def test_paper_rule() -> None:
    """Smith and Islam's rule is the special case s = a = c = hi = 1, lo = -1, no threshold, no offset."""
    u = f64([[-3.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 3.0]])
    one = f64([1.0])
    frozen, real = torch.ones_like(u), torch.zeros_like(u)
    signs, clipped = [[-1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0]], [[-1.0, -1.0, -0.5, 0.0, 0.0, 0.5, 1.0, 1.0]]
    for mask, expected in ((frozen, signs), (real, clipped)):
        assert mix_weight(u, one, pack_mask(mask), 1.0, NAMED["zero"]).tolist() == expected
        assert mix_activation(u, one, None, mask, -1.0, 1.0, 0.0, NAMED["zero"]).tolist() == expected


# ---- against the reference ----

EDGE = 0.75
values = st.one_of(
    st.sampled_from(
        [0.0, -0.0, EDGE, -EDGE, math.nextafter(EDGE, 0.0), math.nextafter(EDGE, 1.0), 0.25, 5e-324, -5e-324]
    ),
    st.floats(-2.0, 2.0),
)
gradients = st.floats(-4.0, 4.0)
bits = st.sampled_from([0.0, 1.0])
shapes = st.tuples(st.integers(1, 4), st.integers(1, 5))
clips = st.sampled_from([EDGE, 1.0, None])


def rows_of(elements: st.SearchStrategy[float], shape: tuple[int, int]) -> st.SearchStrategy[list[list[float]]]:
    row = st.lists(elements, min_size=shape[1], max_size=shape[1])
    return st.lists(row, min_size=shape[0], max_size=shape[0])


@quick
@given(data=st.data(), shape=shapes, c=clips, kind=st.sampled_from(SURROGATES), one_scale=st.booleans())
def test_weight_mix_equals_reference(
    data: st.DataObject, shape: tuple[int, int], c: float | None, kind: str, one_scale: bool
) -> None:
    w, g, mask = (data.draw(rows_of(elements, shape)) for elements in (values, gradients, bits))
    s = data.draw(rows_of(st.floats(0.125, 2.0), (1 if one_scale else shape[0], 1)))
    weight, scale = f64(w).requires_grad_(), f64(s).requires_grad_()
    out = mix_weight(weight, scale, pack_mask(f64(mask)), c, NAMED[kind])
    out.backward(f64(g))

    per_row = [row[0] for row in s] * (shape[0] if one_scale else 1)
    edge = math.inf if c is None else c
    grad_w, grad_s = reference.mix_weight_gradients(g, w, mask, edge, kind)
    assert out.tolist() == reference.mix_weight(w, per_row, mask, edge)
    assert_bits(weight.grad, grad_w)
    assert_reduced(scale.grad, [math.fsum(grad_s)] if one_scale else grad_s)


@quick
@given(
    data=st.data(),
    shape=shapes,
    clip=clips,
    kind=st.sampled_from(SURROGATES),
    offset=bits,
    with_threshold=st.booleans(),
)
def test_activation_mix_equals_reference(
    data: st.DataObject, shape: tuple[int, int], clip: float | None, kind: str, offset: float, with_threshold: bool
) -> None:
    u, g = data.draw(rows_of(values, shape)), data.draw(rows_of(gradients, shape))
    features = (1, shape[1])
    mask, b = data.draw(rows_of(bits, features))[0], data.draw(rows_of(values, features))[0]
    a = data.draw(st.floats(0.125, 2.0))
    low, high = (None, None) if clip is None else (-clip, clip / 2)
    if not with_threshold:
        b = [0.0] * shape[1]
    x, scale = f64(u).requires_grad_(), f64([a]).requires_grad_()
    threshold = f64(b).requires_grad_() if with_threshold else None
    out = mix_activation(x, scale, threshold, f64(mask), low, high, offset, NAMED[kind], width=WIDTH)
    out.backward(f64(g))

    edges = (-math.inf, math.inf) if clip is None else (-clip, clip / 2)
    grad_u, grad_a, grad_b = reference.mix_activation_gradients(g, u, b, mask, *edges, offset, kind, WIDTH * a)
    assert out.tolist() == reference.mix_activation(u, a, b, mask, *edges, offset)
    assert_bits(x.grad, grad_u)
    assert_reduced(scale.grad, [grad_a])
    if threshold is not None and kind != "zero":
        assert_reduced(threshold.grad, grad_b)
    elif threshold is not None:
        assert threshold.grad is None and not any(grad_b)


@quick
@given(data=st.data(), shape=shapes, kind=st.sampled_from(SURROGATES))
def test_surrogate_touches_frozen_entries_only(data: st.DataObject, shape: tuple[int, int], kind: str) -> None:
    w, g, mask = (f64(data.draw(rows_of(elements, shape))) for elements in (values, gradients, bits))
    weights = [w.clone().requires_grad_() for _ in range(2)]
    for weight, surrogate in zip(weights, (kind, "zero"), strict=True):
        mix_weight(weight, f64([1.0]), pack_mask(mask), EDGE, NAMED[surrogate]).backward(g)
    real = mask == 0
    assert torch.equal(weights[0].grad[real], weights[1].grad[real])
    assert not weights[1].grad[~real].any()


def test_leading_dimensions_are_reduced() -> None:
    """Batch and position sum into one gradient a feature and one a layer."""
    torch.manual_seed(0)
    u, g = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    mask, b = f64([1.0, 0.0, 1.0, 1.0]), f64([0.1, -0.2, 0.0, 0.3])
    x, scale, threshold = (t.clone().requires_grad_() for t in (u, f64([0.5]), b))
    mix_activation(x, scale, threshold, mask, -1.0, 1.0, 1.0, NAMED["ste"]).backward(g)
    flat_g, flat_u = g.reshape(6, 4).tolist(), u.reshape(6, 4).tolist()
    grad_u, grad_a, grad_b = reference.mix_activation_gradients(
        flat_g, flat_u, b.tolist(), mask.tolist(), -1.0, 1.0, 1.0, "ste", math.inf
    )
    assert_bits(x.grad.reshape(6, 4), grad_u)
    assert_reduced(scale.grad, [grad_a])
    assert_reduced(threshold.grad, grad_b)


def test_only_asked_gradients_are_made() -> None:
    w, mask = f64([[0.5, -2.0]]), pack_mask(f64([[1.0, 0.0]]))
    scale = f64([[1.0]]).requires_grad_()
    mix_weight(w, scale, mask, 1.0, NAMED["ste"]).sum().backward()
    assert scale.grad.item() == 1.0 and w.grad is None
    assert not mix_weight(w, scale.detach(), mask, 1.0, NAMED["ste"]).requires_grad


# ---- half precision ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_the_signs_of_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tiny = torch.finfo(dtype).smallest_normal
    edges = torch.tensor([0.0, -0.0, tiny, -tiny, 2 * tiny, -2 * tiny, 1.0, -1.0])
    u = torch.cat([edges, torch.randn(120)]).to(dtype)
    b = torch.cat([edges.flip(0), torch.randn(120)]).to(dtype)
    b[60:90] = u[60:90]  # exactly at the threshold: +1
    assert torch.equal(hard(u).float(), hard(u.float()))
    ones = torch.ones(1, dtype=dtype)
    kwargs = {"low": None, "high": None, "offset": 0.0, "surrogate": NAMED["ste"]}
    half = mix_activation(u, ones, b, torch.ones_like(u), **kwargs)
    full = mix_activation(u.float(), ones.float(), b.float(), torch.ones(128), **kwargs)
    assert half.dtype == dtype
    assert torch.equal(half.float(), full)
    assert (half[60:90] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_leaves_the_mixes_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    u, mask = torch.randn(6, 8), (torch.rand(6, 8) < 0.5).float()
    args = (torch.full((6, 1), 0.3), pack_mask(mask), 0.9, NAMED["ste"])
    plain = mix_weight(u, *args)
    activation = (torch.tensor([0.3]), torch.randn(8), mask, -1.0, 1.0, 1.0, NAMED["ste"])
    plain_activation = mix_activation(u, *activation)
    with torch.autocast("cpu", dtype):
        assert torch.equal(mix_weight(u, *args), plain)
        assert torch.equal(mix_activation(u, *activation), plain_activation)
        assert torch.equal(hard(u), hard(u.to(dtype)).float())

"""Training with the compiled part and without: masks' mixes, frozen layers and whole runs, equal bit for bit."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import models
import pytest
import reference
import torch
import vision
from hypothesis import HealthCheck, given, settings, strategies as st
from instruction_sets import limited_to
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stompp_hf import BinaryConv1D, BinaryConv2d, BinaryLayer, BinaryLinear, StoMPPConfig, binarize_model, kernels
from stompp_hf.kernels import native, training
from stompp_hf.kernels.native import _FUNCTIONS
from stompp_hf.method.mask_bits import pack_mask
from stompp_hf.method.mixing import mix_activation, mix_weight
from stompp_hf.method.sign_bits import pack_signs
from stompp_hf.method.surrogates import SURROGATES as NAMED
from stompp_hf.modules import FROZEN

SURROGATES = ("zero", "ste", "clipped_ste", "windowed_ste")
CALLS = tuple(name for name in _FUNCTIONS if name not in ("stompp_choose", "stompp_set_team"))
SPECIAL = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -3e38, 3e38, 1.0, -1.0])

pytestmark = pytest.mark.skipif(native.library_path() is None, reason="the compiled part was not built")
several = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["portable", "avx2"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each set of instructions that the mixes are compiled for; the environment's afterwards."""
    yield from limited_to(request.param)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """Counts the calls of each compiled function."""
    counted: Counter = Counter()
    library = kernels.use("c").native

    def counting(name: str) -> Any:
        function = getattr(library, name)

        def call(*arguments: Any) -> Any:
            counted[name] += 1
            return function(*arguments)

        return call

    for name in CALLS:
        monkeypatch.setattr(library, name, counting(name), raising=False)
    yield counted
    kernels.use()


def numbers(shape: tuple[int, ...], seed: int, special: bool) -> Tensor:
    """Normal, with zeros of both signs; and with all that is special."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(shape, generator=generator)
    chosen = torch.randint(len(SPECIAL) if special else 2, shape, generator=generator)
    values = SPECIAL if special else torch.tensor([0.0, -0.0])
    return torch.where(torch.rand(shape, generator=generator) < 0.2, values[chosen], u)


def steps(tensor: Tensor) -> list[int]:
    """The strides that say where an entry lies: a dimension of size 1 has none, and torch gives it any."""
    return [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def assert_same(found: Tensor | None, expected: Tensor | None) -> None:
    """Equal bit for bit, NaN where NaN is, but for the sign of a zero; in the same layout."""
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found.dtype == expected.dtype and steps(found) == steps(expected)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)


WAYS = (kernels.switched_off, contextlib.nullcontext)
"""Plain torch, and what is chosen outside: compiled C."""


def both_ways(run: Any, instructions: str) -> None:
    """The same with plain torch and with compiled C."""
    with kernels.switched_off():
        expected = run()
    assert kernels.choice().instructions == instructions
    for found, wanted in zip(run(), expected, strict=True):
        assert_same(found, wanted)


def layouts(shape: tuple[int, ...]) -> Iterator[Any]:
    """How a tensor of this shape may lie in memory."""
    yield lambda t: t.contiguous()
    if len(shape) == 4:
        yield lambda t: t.contiguous(memory_format=torch.channels_last)
    yield lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)


# ---- the mixes ----


@st.composite
def activations(draw: Any) -> dict[str, Any]:
    """Inputs of a linear layer (..., features) or of a convolution (batch, channels, *size), and all options."""
    features = draw(st.sampled_from([1, 3, 16, 33, 1100]))
    rest = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=2)))
    after = tuple(draw(st.lists(st.integers(1, 40), max_size=2)))
    shape = (rest[0], features, *after) if after else (*rest, features)
    return {
        "shape": shape,
        "spread": (features, *[1] * len(after)),
        "layout": draw(st.sampled_from(list(layouts(shape)))),
        "kind": draw(st.sampled_from(SURROGATES)),
        "offset": draw(st.sampled_from([0.0, 1.0])),
        "clip": draw(st.sampled_from([None, (-0.5, 1.25), (0.0, 1.0)])),
        "threshold": draw(st.booleans()),
        "absorbed": draw(st.booleans()),
        "special": draw(st.booleans()),
        "wants": draw(st.lists(st.booleans(), min_size=4, max_size=4)),
        "seed": draw(st.integers(0, 99)),
    }


@given(activations())
@several
def test_activation_mixes_are_those_of_torch(instructions: str, case: dict[str, Any]) -> None:
    seed, special = case["seed"], case["special"]
    u = case["layout"](numbers(case["shape"], seed, special))
    scale, threshold = numbers((1,), seed + 1, False).abs() + 0.1, numbers(case["spread"], seed + 2, False)
    mask = numbers(case["spread"], seed + 3, False) > 0
    grad = case["layout"](numbers(case["shape"], seed + 4, special))
    low, high = case["clip"] or (None, None)

    def run() -> list[Tensor | None]:
        real = u.relu() if case["absorbed"] else None
        inputs = [u.clone(), real, scale.clone(), threshold.clone() if case["threshold"] else None]
        asked = [t for t, wanted in zip(inputs, case["wants"], strict=True) if t is not None and wanted]
        for tensor in asked:
            tensor.requires_grad_()
        y = mix_activation(
            *inputs[:1], *inputs[2:], mask, low, high, case["offset"], NAMED[case["kind"]], inputs[1], 1.5
        )
        return [y.detach(), *(torch.autograd.grad(y, asked, grad, allow_unused=True) if asked else ())]

    both_ways(run, instructions)


@given(
    st.sampled_from([(1, 1), (5, 33), (33, 5), (3, 1500), (6, 4, 3, 3), (2, 7, 9)]), st.integers(0, 2),
    st.sampled_from(SURROGATES), st.sampled_from([None, 0.4]), st.booleans(), st.booleans(), st.integers(0, 99),
)  # fmt: skip
@several
def test_weight_mixes_are_those_of_torch(
    instructions: str, shape: tuple[int, ...], axis: int, kind: str, clip: Any, layout: bool, special: bool, seed: int
) -> None:
    """Scales one a row (linear layers, convolutions), a column (GPT-2's Conv1D), a looked-up row, or a single one."""
    w = numbers(shape, seed, special).nan_to_num(1.0, math.inf, -math.inf)  # a gradient may be NaN, a latent never is
    w = w.transpose(0, 1).contiguous().transpose(0, 1) if layout else w
    one = [1] * len(shape)
    sizes = ((shape[0], *one[1:]), (*one[:-1], shape[-1]), (*shape[:-1], 1))[axis] if seed % 4 else (1,)
    scale = numbers(sizes, seed + 1, False).abs()
    bits = pack_mask(numbers(shape, seed + 2, False) > 0)
    grad = numbers(shape, seed + 3, special)

    def run() -> list[Tensor]:
        weight, s = w.clone().requires_grad_(), scale.clone().requires_grad_()
        y = mix_weight(weight, s, bits, clip, NAMED[kind])
        return [y.detach(), *torch.autograd.grad(y, (weight, s), grad)]

    both_ways(run, instructions)


@pytest.fixture(params=["portable", "avx2", "avx512", "neon", "torch"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each set of instructions that reads bits, and plain torch."""
    if request.param == "torch":
        with kernels.switched_off():
            yield request.param
    else:
        yield from limited_to(request.param)


@given(
    st.one_of(st.tuples(st.integers(1, 9), st.integers(1, 40)), st.sampled_from([(3, 1025), (1, 2051), (257, 9)])),
    st.sampled_from(SURROGATES), st.sampled_from([None, 0.4]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
@settings(several, max_examples=30)
def test_weight_mixes_of_any_size_are_those_of_the_reference(
    backend: str, shape: tuple[int, int], kind: str, clip: float | None, by_row: bool, seed: int
) -> None:
    """Rows that begin within a byte of the mask, and pieces of them; nothing is rounded but the sums."""
    weight, grad = numbers(shape, seed, False).requires_grad_(), numbers(shape, seed + 1, False)
    scale = (numbers((shape[0] if by_row else 1, 1), seed + 2, False).abs() + 0.1).requires_grad_()
    mask = numbers(shape, seed + 3, False) > 0
    y = mix_weight(weight, scale, pack_mask(mask), clip, NAMED[kind])
    y.backward(grad)

    edge, w, m = math.inf if clip is None else float(torch.tensor(clip)), weight.tolist(), mask.double().tolist()
    scales = scale.expand(shape[0], 1).flatten().tolist()
    to_w, to_s = reference.mix_weight_gradients(grad.tolist(), w, m, edge, kind)
    assert torch.equal(y.detach(), torch.tensor(reference.mix_weight(w, scales, m, edge)))
    assert torch.equal(weight.grad, torch.tensor(to_w))
    expected = torch.tensor(to_s)[:, None] if by_row else torch.tensor([[math.fsum(to_s)]])
    bound = 1e-6 * grad.abs().sum().item()
    torch.testing.assert_close(scale.grad, expected, rtol=0.0, atol=bound)


@given(st.sampled_from([(1,), (3, 1100), (2, 8, 5, 7)]), st.booleans(), st.integers(0, 99))
@several
def test_gradients_through_a_window_are_those_of_torch(
    instructions: str, shape: tuple[int, ...], special: bool, seed: int
) -> None:
    window = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    for layout in layouts(shape):
        grad, mask = layout(numbers(shape, seed, special)), layout(window)
        expected = grad * mask
        done = training.through_window(grad, mask)
        assert done == (grad.is_contiguous() or grad.is_contiguous(memory_format=torch.channels_last))
        assert_same(grad if done else grad.mul_(mask), expected)
    assert not training.through_window(numbers(shape, seed, special).double(), window)


def test_mixes_are_compiled_where_they_can_be(calls: Counter) -> None:
    """Float32 in the usual layouts; and plain torch for what else there is."""
    images, words, mask = torch.randn(2, 8, 5, 5), torch.randn(2, 3, 8), torch.rand(8) < 0.5
    a = torch.ones(1)
    last = images.contiguous(memory_format=torch.channels_last)
    for number, (u, m) in enumerate([(words, mask), (images, mask[:, None, None]), (last, mask[:, None, None])], 1):
        u = u.detach().requires_grad_()
        mix_activation(u, a, None, m, -1.0, 1.0, 0.0, NAMED["ste"]).square().sum().backward()
        assert calls["stompp_mix"] == calls["stompp_mix_backward"] == number
    calls.clear()
    for u, m in ((words.double(), mask), (words.bfloat16(), mask), (words.transpose(0, 1), mask)):
        y = mix_activation(u.requires_grad_(), a.to(u.dtype), None, m, -1.0, 1.0, 0.0, NAMED["ste"])
        y.square().sum().backward()
    assert not calls
    w = torch.randn(4, 8, requires_grad=True)
    mix_weight(w, torch.ones(4, 1), pack_mask(torch.rand(4, 8) < 0.5), 1.0, NAMED["zero"]).square().sum().backward()
    assert calls == {"stompp_mix": 1, "stompp_mix_weight_backward": 1}


def test_threads_change_nothing(instructions: str) -> None:
    u, mask, b = numbers((300, 700), 0, False), numbers((700,), 1, False) > 0, numbers((700,), 2, False)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(
                (training.mix(u, None, torch.ones(1), b, mask, (-1.0, 1.0), 0.0, 7, 1.0), kernels.pack(u, True))
            )
    finally:
        torch.set_num_threads(before)
    (((y, code), bits), ((other_y, other_code), other_bits)) = results
    assert torch.equal(y, other_y) and torch.equal(code, other_code) and torch.equal(bits, other_bits)


# ---- frozen layers ----


@given(st.integers(1, 40), st.one_of(st.integers(1, 100), st.integers(8000, 9000)), st.integers(0, 9))
@several
def test_packed_latents_are_their_signs(instructions: str, rows: int, count: int, seed: int) -> None:
    w = numbers((rows, count), seed, False)
    assert torch.equal(kernels.pack(w, False), pack_signs(w))
    assert torch.equal(kernels.pack(w.t().contiguous(), True), pack_signs(w))


PLAIN: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "linear": (BinaryLinear, lambda: nn.Linear(37, 70), (3, 5, 37)),
    "no-bias": (BinaryLinear, lambda: nn.Linear(64, 5, bias=False), (9, 64)),
    "gpt2": (BinaryConv1D, lambda: Conv1D(70, 37), (3, 5, 37)),
    "conv": (BinaryConv2d, lambda: nn.Conv2d(8, 6, 3, padding=1), (2, 8, 7, 9)),
    "strides": (BinaryConv2d, lambda: nn.Conv2d(16, 6, 3, 2, padding=1, groups=2), (2, 16, 9, 9)),
    "few-channels": (BinaryConv2d, lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 9, 9)),
    "few-places": (BinaryConv2d, lambda: nn.Conv2d(8, 6, 3, padding=1), (1, 8, 3, 3)),
}


def frozen_layer(name: str, config: StoMPPConfig, offset: bool = False) -> tuple[BinaryLayer, Tensor]:
    torch.manual_seed(0)
    cls, plain, shape = PLAIN[name]
    layer, x = cls.convert(plain(), config), torch.randn(shape)
    layer.calibrate_weight()
    rows = layer.product.rows(x)
    layer.calibrate_activation(rows.abs() if offset else rows)
    layer.enter(FROZEN, 1.0)
    return layer, x


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("kind", SURROGATES)
@pytest.mark.parametrize("name", PLAIN)
def test_frozen_layers_are_those_of_torch(name: str, kind: str, learn: bool, offset: bool, calls: Counter) -> None:
    """Output and every gradient, with a weight that learns and without: the scales' gradients are made in two ways."""
    fixed = {} if learn else {"learn_weight_scale": False, "learn_activation_scale": False}
    layer, x = frozen_layer(name, StoMPPConfig(frozen_gradient=kind, **fixed), offset)
    assert layer.activation_offset == offset
    grad = None
    for trains_weight in (True, False):
        layer.weight.requires_grad_(trains_weight)
        results = []
        for way in WAYS:
            layer.zero_grad()
            own = x.clone().requires_grad_()
            with way():
                y = layer(own)
                grad = torch.randn_like(y) if grad is None else grad
                y.backward(grad)
            results.append([y.detach(), own.grad, *(p.grad for p in layer.parameters())])
        for found, expected in zip(*results, strict=True):
            assert_same(found, expected)
    pays = not name.startswith("few")
    assert calls["stompp_pack"] == 2 * pays
    assert calls["stompp_conv" if "Conv2d" in type(layer).__name__ else "stompp_linear"] == 2 * pays


@pytest.mark.parametrize("name", ["linear", "gpt2", "conv"])
def test_signs_are_never_stale(name: str, calls: Counter) -> None:
    """Latents may change behind the back of every version counter."""
    layer, x = frozen_layer(name, StoMPPConfig())
    for _ in range(3):
        results = []
        for way in WAYS:
            with way():
                results.append(layer(x).detach())
        assert torch.equal(*results)
        with torch.no_grad():
            layer.weight.data.view(-1)[0].neg_()
    assert calls["stompp_pack"] == 3


def test_bits_of_a_convolution_stay_while_no_sign_changes(calls: Counter) -> None:
    layer, x = frozen_layer("conv", StoMPPConfig())
    for _ in range(2):
        layer(x)
        layer.weight.data.mul_(1.5)
    assert calls["stompp_tap_words"] == 1
    layer.weight.data.neg_()
    layer(x)
    assert calls["stompp_tap_words"] == 2


# ---- whole runs ----

RUNS: dict[str, Any] = {"bert": models.CASES["bert"], "gpt2": models.CASES["gpt2"], "resnet": vision.CASES["resnet"]}


@pytest.mark.parametrize("kind", ["zero", "windowed_ste"])
@pytest.mark.parametrize("name", RUNS)
def test_runs_are_those_of_torch(name: str, kind: str, calls: Counter) -> None:
    """Twenty steps through every stage: losses, weights and logits, with compiled C and without."""
    case = RUNS[name]
    runs = []
    for way in WAYS:
        calls.clear()
        with way():
            model = binarize_model(case.build(), models.quick(frozen_gradient=kind))
            losses = models.train(model, case, 0, 20, 20)
            with torch.no_grad():
                logits = model.eval()(**case.batch(99)).logits
        runs.append((losses, model.state_dict(), logits))
        product = "stompp_conv" if name == "resnet" else "stompp_linear"
        used = ("stompp_mix", "stompp_mix_backward", "stompp_mix_weight_backward", "stompp_pack", product)
        assert all((calls[function] > 0) == (way is not WAYS[0]) for function in used), calls
    (losses, state, logits), (other_losses, other_state, other_logits) = runs
    assert losses == other_losses
    assert models.same_tensors(state, other_state) == []
    assert torch.equal(logits, other_logits)

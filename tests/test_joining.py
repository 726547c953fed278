"""Fused layers that hand each other bits: the same logits, and numbers wherever somebody wants to see them."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from instruction_sets import limited_to
from torch import Tensor, nn
from torch.nn import functional as F

from stompp_hf import (
    Progression,
    StoMPPConfig,
    binarize_model,
    calibrate,
    fuse_for_inference,
    kernels,
    pack_model,
    unfuse,
)
from stompp_hf.errors import PackingError, ShapeError
from stompp_hf.functional import hard_above
from stompp_hf.kernels import Cut, Signs, handed
from stompp_hf.modules.bits import pack_signs
from stompp_hf.modules.folded import FoldedBatchNorm
from stompp_hf.modules.joined import cut_of

pytestmark = pytest.mark.skipif(kernels.native.library_path() is None, reason="the compiled part was not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
manual = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["portable", "avx2", "avx512"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each set of instructions in turn."""
    yield from limited_to(request.param)


# ---- where a sum becomes a sign ----

floats = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-45, -1e-45, 1e-38, 65504.0]),
    st.floats(-40, 40, width=32),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
)


@given(
    st.lists(st.tuples(floats, floats, floats), min_size=1, max_size=40), st.integers(1, 50), st.sampled_from(DTYPES),
    st.booleans(), st.booleans(),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_cuts_are_where_the_signs_change(
    rows: list[tuple[float, float, float]], most: int, dtype: torch.dtype, shifted: bool, above: bool
) -> None:
    scale, shift, threshold = torch.tensor(rows).T.contiguous()
    shift, threshold = shift if shifted else None, threshold if above else None
    cut = cut_of(scale, shift, threshold, dtype, most, len(rows))
    assert cut is not None
    z = torch.arange(-most, most + 1.0)[:, None]
    y = z * scale if shift is None else z * scale + shift
    expected = hard_above(y.to(dtype).float(), threshold) > 0
    flips = (cut.flips[:, None] >> torch.arange(32) & 1).flatten()[: len(rows)].bool()
    assert torch.equal((z >= cut.least) ^ flips, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_there_is_no_cut_of_what_is_not_finite(value: float) -> None:
    fine, bad = torch.ones(3), torch.tensor([1.0, value, 1.0])
    for values in ((bad, fine, fine), (fine, bad, fine), (fine, fine, bad)):
        assert cut_of(*values, torch.float32, 9, 3) is None
    assert cut_of(fine, None, None, torch.float32, 9, 3) is not None


# ---- calls that give bits and take them ----


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 60), st.integers(1, 150), st.integers(1, 200), st.integers(1, 90), st.integers(0, 9))
@manual
def test_linear_layers_hand_over_bits(
    instructions: str, rows: int, inner: int, middle: int, outer: int, seed: int
) -> None:
    x, b, c = numbers((2, rows, inner), seed), numbers((inner,), 1), numbers((middle,), 2)
    first, second = numbers((middle, inner), seed + 3), numbers((outer, middle), seed + 4)
    scale, shift = numbers((middle,), 5), numbers((middle,), 6)
    numeric = kernels.linear(x, b, pack_signs(first), scale, shift, torch.float32)
    expected = kernels.linear(numeric, c, pack_signs(second), None, None, torch.float32)
    cut = cut_of(scale, shift, c, torch.float32, inner, middle)
    assert cut is not None
    signs = handed.linear(x, b, pack_signs(first), None, None, cut)
    assert isinstance(signs, Signs) and signs.shape == numeric.shape
    y = handed.linear(signs, None, pack_signs(second), None, None, torch.float32)
    assert isinstance(y, Tensor) and torch.equal(y, expected)


@given(
    st.integers(1, 3), st.sampled_from([8, 33, 64]), st.sampled_from([9, 32, 100, 130]), st.sampled_from([0, 1, 2]),
    st.integers(1, 3), st.integers(1, 2), st.sampled_from([-1, 0, 1]), st.booleans(), st.integers(0, 9),
)  # fmt: skip
@manual
def test_convolutions_hand_over_bits(
    instructions: str, dims: int, inner: int, middle: int, around: int, kernel: int, stride: int, pad: int, split: bool,
    seed: int,
) -> None:  # fmt: skip
    groups = 2 if split else 1
    inner, middle, outer = (64, 128, 6) if split else (inner, middle, 5)
    x = numbers((2, inner, *[5] * (dims - 1), 9), seed)
    b, c = numbers((inner,), 1), numbers((middle,), 2)
    first = pack_signs(numbers((middle, inner // groups * kernel**dims), 3))
    second = pack_signs(numbers((outer, middle // groups * kernel**dims), 4))
    scale, shift = numbers((middle,), 5), numbers((middle,), 6) * inner
    sizes = ([kernel] * dims, [stride] * dims, [(around, around)] * dims, [1] * dims, groups, pad)
    last = ([kernel] * dims, [1] * dims, [(kernel, kernel)] * dims, [1] * dims, groups, pad)
    numeric = kernels.conv(x, b, first, scale, shift, torch.float32, *sizes)
    expected = kernels.conv(numeric, c, second, None, None, torch.float32, *last)
    cut = cut_of(scale, shift, c, torch.float32, inner // groups * kernel**dims, middle)
    assert cut is not None
    signs = handed.conv(x, b, first, None, None, cut, *sizes)
    assert isinstance(signs, Signs) and signs.shape == numeric.shape
    if split:
        with pytest.raises(ShapeError, match="6 channels as bits, in 2 groups"):
            handed.conv(signs, None, second, None, None, Cut(torch.ones(6), torch.zeros(1).int()), *last)
    y = handed.conv(signs, None, second, None, None, torch.float32, *last)
    assert isinstance(y, Tensor) and torch.equal(y, expected)


def test_a_cut_that_does_not_fit_never_reaches_c() -> None:
    bits = torch.zeros(4, 1, dtype=torch.uint8)
    weight = torch.zeros(4, 8 * 9 // 8, dtype=torch.uint8)
    sizes = ([3, 3], [1, 1], [(0, 0)] * 2, [1, 1], 1, 0)
    for shape in ((1, 8, 2, 5), (8, 5, 5)):
        signs = Signs(torch.zeros(500).int(), torch.Size(shape))
        with pytest.raises(ShapeError):
            handed.conv(signs, None, weight, None, None, torch.float32, *sizes)
    for cut in (Cut(torch.ones(3), torch.zeros(1).int()), Cut(torch.ones(4), torch.zeros(2).int()),
                Cut(torch.ones(4), torch.zeros(1))):  # fmt: skip
        with pytest.raises(ShapeError, match="4 outputs"):
            handed.linear(torch.ones(2, 8), None, bits, None, None, cut)


# ---- whole models ----


def _resnet(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = [16, 32] if kind == "basic" else [64, 128]
    config = hf.ResNetConfig(layer_type=kind, embedding_size=16, hidden_sizes=sizes, depths=[2, 2])
    return hf.ResNetForImageClassification(config), {"pixel_values": numbers((2, 3, 40, 40), 0)}


def _opt() -> tuple[nn.Module, dict[str, Tensor]]:
    config = hf.OPTConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, ffn_dim=72, num_attention_heads=2, word_embed_proj_dim=32,
        max_position_embeddings=32,
    )  # fmt: skip
    return hf.OPTForCausalLM(config), {"input_ids": torch.arange(24).view(2, 12)}


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Tensor]]], int]] = {
    "basic": (lambda: _resnet("basic"), 4),
    "bottleneck": (lambda: _resnet("bottleneck"), 8),
    "opt": (_opt, 2),
}


def packed(model: Any, inputs: Any, **options: Any) -> Any:
    """A packed model, whose BatchNorms have seen something, and multiply by negative numbers too."""
    torch.manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
                tensor.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    model = binarize_model(model.eval(), StoMPPConfig(refresh_rate=2, **options), inputs)
    Progression(model, 100).step(100)
    calibrate(model, [inputs])
    return pack_model(model).eval()


def giving(model: nn.Module) -> list[Any]:
    """The layers that give bits."""
    return [module for module in model.modules() if "join" in module.__dict__]


def apart(model: nn.Module) -> Any:
    """A copy of a fused model whose layers give numbers."""
    model = copy.deepcopy(model)
    for layer in giving(model):
        del layer.join
    return model


def outputs(model: Any, inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", MODELS)
def test_models_have_the_same_logits(name: str, instructions: str) -> None:
    build, count = MODELS[name]
    torch.manual_seed(1)
    plain, inputs = build()
    model = packed(plain, inputs)
    before = outputs(model, inputs)
    fuse_for_inference(model, inputs)
    assert len(giving(model)) == count
    assert torch.equal(outputs(model, inputs), outputs(apart(model), inputs))
    larger = {key: torch.cat([value, value.flip(-1)]) for key, value in inputs.items()}
    assert torch.equal(outputs(model, larger), outputs(apart(model), larger))
    assert torch.equal(outputs(copy.deepcopy(model), inputs), outputs(model, inputs))
    kernels.use("torch")
    assert torch.equal(outputs(model, inputs), outputs(apart(model), inputs))
    kernels.use("c", instructions)
    assert not giving(unfuse(model)) and torch.equal(outputs(model, inputs), before)
    fuse_for_inference(model, inputs, exact=True)
    assert len(giving(model)) == (count if name == "opt" else 0)  # a BatchNorm reads numbers
    assert torch.equal(outputs(model, inputs), before)


@pytest.fixture
def fused() -> tuple[Any, dict[str, Tensor]]:
    plain, inputs = _resnet("basic")
    return fuse_for_inference(packed(plain, inputs), inputs), inputs


def test_whoever_looks_sees_numbers(fused: tuple[Any, dict[str, Tensor]]) -> None:
    model, inputs = fused
    expected, layer = outputs(model, inputs), giving(model)[0]
    passed = [module for module in layer.join.between if isinstance(module, FoldedBatchNorm)]
    assert len(passed) == 1
    for module in (layer, layer.join.reader, *passed):
        seen: list[Tensor] = []
        handles = [
            module.register_forward_hook(lambda m, a, y, s=seen: s.append(y)),
            module.register_forward_pre_hook(lambda m, a, s=seen: s.append(a[0])),
        ]
        assert torch.equal(outputs(model, inputs), expected)
        assert len(seen) == 2 and all(bool(tensor.isfinite().all()) for tensor in seen)
        for handle in handles:
            handle.remove()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(y))
    outputs(model, inputs)
    handle.remove()
    assert all(bool(tensor.isfinite().all()) for tensor in seen if isinstance(tensor, Tensor))
    with torch.no_grad():
        y = layer(numbers((1, layer.in_channels, 8, 8), 3))
    assert y.shape == (1, layer.out_channels, 8, 8) and bool(y.isnan().all())  # its only reader takes the bits
    other = giving(model)[1].join.reader
    with pytest.raises(PackingError, match="the bits of another layer"), torch.no_grad():
        other(y)


def test_other_precisions_and_layouts(fused: tuple[Any, dict[str, Tensor]]) -> None:
    model, inputs = fused
    plain = apart(model)
    last = {key: value.contiguous(memory_format=torch.channels_last) for key, value in inputs.items()}
    assert torch.equal(outputs(model, last), outputs(plain, last))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(outputs(model, inputs), outputs(plain, inputs))
    halves = {key: value.bfloat16() for key, value in inputs.items()}
    later = copy.deepcopy(model).bfloat16()
    assert torch.equal(outputs(later, halves), outputs(copy.deepcopy(plain).bfloat16(), halves))
    again = fuse_for_inference(unfuse(later), halves)  # bits that come from numbers in bfloat16
    assert len(giving(again)) == 4
    assert torch.equal(outputs(again, halves), outputs(apart(again), halves))


def test_graphs_are_those_of_layers_apart(fused: tuple[Any, dict[str, Tensor]]) -> None:
    model, inputs = fused
    expected = outputs(model, inputs)
    with torch.no_grad():
        torch.compiler.reset()
        assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs).logits, expected)
        assert torch.equal(torch.export.export(model, (), inputs).module()(**inputs).logits, expected)


class Chain(nn.Module):
    """Linear layers, of which three (the first stays real) hand each other bits, but for what happens on the way."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(40, 40) for _ in range(4))
        self.head, self.between = nn.Linear(40, 3), between

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x)
        x = self.between(x)
        return self.head(self.layers[-1](x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("between", "count"),
    [
        (lambda x: x, 2),
        (lambda x: F.dropout(x, 0.5, training=False), 2),
        (lambda x: x.contiguous(), 1),  # no operation where it is so already, and bits lose their way where not
        (lambda x: x.view(-1, 40), 1),
        (lambda x: F.relu(x), 1),
        (lambda x: x * 2, 1),
        (lambda x: x + x.detach(), 1),
    ],
)
def test_what_is_read_on_the_way_stays_numbers(between: Callable[[Tensor], Tensor], count: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 40)
    model = binarize_model(Chain(between), StoMPPConfig(refresh_rate=2), x)
    Progression(model, 10).step(10)
    calibrate(model, [(x,)])
    pack_model(model).eval()
    with torch.no_grad():
        before = model(x)
        fuse_for_inference(model, x, exact=True)
        assert len(giving(model)) == count
        assert torch.equal(model(x), before)

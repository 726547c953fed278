"""Attention by popcounts against plain torch, bit for bit, for each set of instructions of this CPU."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from beyond import CASES, attentions, build
from hypothesis import HealthCheck, given, settings, strategies as st
from instruction_sets import limited_to
from models import logits, quick, train
from torch import Tensor

from stompp_hf import BinaryAttention, StoMPPConfig, binarize_model, kernels, pack_model
from stompp_hf.kernels import native
from stompp_hf.modules import FROZEN
from stompp_hf.modules.attention import PROJECTED, SITES, Call, beside, probabilities, scores_of

pytestmark = pytest.mark.skipif(native.library_path() is None, reason="the compiled part was not built")
manual = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NO_THRESHOLDS = {"activation_threshold": "none", "activation_levels": "symmetric", "learn_activation_threshold": False}
SIZES = [1, 7, 8, 31, 32, 33, 40, 64, 65, 80, 128, 130]
LOW = {"lowest": torch.finfo(torch.float32).min, "infinite": -torch.inf, "hundred": -100.0}


@pytest.fixture(params=["portable", "avx2", "avx512", "neon"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each set of instructions in turn."""
    yield from limited_to(request.param)


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal, with zeros of both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.2, torch.copysign(torch.zeros_like(u), u), u)


def frozen(shape: tuple[int, int, int, int], keys: int, seed: int, **options: Any) -> BinaryAttention:
    """With thresholds and scales of every size, and about as many probabilities above theirs as below."""
    module = BinaryAttention(StoMPPConfig(attention="binarize", **options), list(shape), torch.zeros(1))
    module.calibrate_unseen()
    module.enter(FROZEN, 1.0)
    with torch.no_grad():
        for number, site in enumerate(SITES):
            scale, threshold = getattr(module, f"{site}_scale"), getattr(module, f"{site}_threshold")
            scale.copy_(numbers(scale.shape, seed + number).abs() + 0.1)
            if threshold is not None and site in PROJECTED:
                threshold.copy_(numbers(threshold.shape, seed - number) / 3)
        module.probability_threshold.copy_((1 + numbers((shape[0],), seed)) / keys)
    return module.eval()


def noted(module: BinaryAttention) -> list[bool]:
    """Whether the kernel did it, for each call from now on."""
    taken: list[bool] = []
    real = module._by_kernel

    def by_kernel(*of: Any) -> Any:
        found = real(*of)
        taken.append(found is not None)
        return found

    module._by_kernel = by_kernel  # type: ignore[method-assign]
    return taken


def both_ways(module: BinaryAttention, operands: list[Tensor], call: Call) -> tuple[Any, Any]:
    """By kernel, which has to say that it did it, and by plain torch."""
    taken = noted(module)
    with torch.inference_mode():
        found = module(*operands, call)
        with kernels.switched_off():
            expected = module(*operands, call)
    assert taken == [True, False]
    return found, expected


def never(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
    raise AssertionError("the original implementation is for pending attention")


@st.composite
def calls(draw: Any) -> tuple[tuple[int, int, int, int], list[Tensor], dict[str, Any], int]:
    """Heads and sizes, operands as models lay them out, what comes beside them, and a seed."""
    groups, each = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size, value_size = draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))
    batch, queries = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 9, 50, 100]))
    keys = draw(st.sampled_from([1, 5, 31, 32, 33, 64, 100, 129, 300]))
    seed = draw(st.integers(0, 9))
    heads = groups * each
    sizes = [(queries, heads, size), (keys, groups, size), (keys, groups, value_size)]
    operands = [numbers((batch, *own), seed + i).transpose(1, 2) for i, own in enumerate(sizes)]
    if draw(st.booleans()):  # a cache
        operands[1:] = [u.contiguous() for u in operands[1:]]
    if draw(st.booleans()):
        operands[draw(st.integers(0, 2))].mul_(-1e-30)
    options: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(seed)
    mask_shape = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])), queries, keys)
    allowed = torch.rand(mask_shape, generator=generator) < 0.7
    allowed[..., 0, :] &= draw(st.booleans())  # or this query sees nothing
    kind = draw(st.sampled_from(["none", "boolean", "causal", *LOW]))
    if kind == "boolean":
        options["mask"] = allowed
    elif kind == "causal":
        options["causal"] = True
    elif kind != "none":
        options["mask"] = torch.where(allowed, numbers(mask_shape, seed + 7), LOW[kind])
    if draw(st.booleans()):
        options["bias"] = numbers((1, heads, queries, draw(st.sampled_from([1, keys]))), seed + 8)
    if draw(st.booleans()):
        options["scaling"] = 0.37
    options["wants_weights"] = draw(st.booleans())
    return (heads, groups, size, value_size), operands, options, seed


@given(calls(), st.sampled_from([{}, NO_THRESHOLDS]))
@manual
def test_probabilities_are_those_of_torch(instructions: str, case: Any, thresholds: dict[str, Any]) -> None:
    """Outputs have few levels, and would hide a last bit."""
    shape, operands, options, seed = case
    module, call = frozen(shape, operands[1].shape[2], seed, **thresholds), Call(never, **options)
    with torch.inference_mode():
        query, key, _ = module._operands(*operands)
        scores = scores_of(module._product(query, key.transposed()), operands[0], call)
        expected, _ = probabilities(scores, call)
        found = module._by_kernel(
            (operands[0], operands[1], operands[2]),
            Call(never, scaling=call.scaling, wants_weights=True),
            *beside(scores.shape, call, scores.device),
        )
    assert found is not None and found[1] is not None and torch.equal(found[1], expected)


@given(calls(), st.sampled_from([{}, NO_THRESHOLDS]))
@manual
def test_outputs_are_those_of_torch(instructions: str, case: Any, thresholds: dict[str, Any]) -> None:
    shape, operands, options, seed = case
    module = frozen(shape, operands[1].shape[2], seed, **thresholds)
    (y, weights), (wanted, wanted_weights) = both_ways(module, operands, Call(never, **options))
    assert y.dtype is torch.float32 and y.is_contiguous() and torch.equal(y, wanted)
    assert (weights is None) == (wanted_weights is None) == (not options["wants_weights"])
    assert weights is None or torch.equal(weights, wanted_weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out(instructions: str, dtype: torch.dtype) -> None:
    module = frozen((4, 2, 40, 24), 70, 0).to(dtype)
    operands = [numbers((2, heads, 70, size), size).to(dtype) for heads, size in ((4, 40), (2, 40), (2, 24))]
    mask = torch.where(torch.ones(70, 70).tril().bool(), 0.0, torch.finfo(dtype).min).to(dtype)[None, None]
    (y, _), (wanted, _) = both_ways(module, operands, Call(never, mask=mask))
    assert y.dtype is dtype and torch.equal(y, wanted) and y.unique().numel() > 9


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_and_the_scores_at_a_time_change_nothing(
    instructions: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, expected = frozen((6, 3, 64, 64), 400, 1), None
    operands = [numbers((2, heads, count, 64), heads) for heads, count in ((6, 70), (3, 400), (3, 400))]
    for number, scores in ((1, 2**30), (threads, 1), (threads, 2**16), (threads, 2**30)):
        monkeypatch.setattr(kernels.attending, "SCORES", scores)
        torch.set_num_threads(number)
        (y, _), (wanted, _) = both_ways(module, operands, Call(never, causal=True))
        expected = wanted if expected is None else expected
        assert torch.equal(y, expected) and torch.equal(wanted, expected)
    torch.set_num_threads(1)


def test_probabilities_that_are_no_number_are_nothing(instructions: str) -> None:
    module = frozen((2, 2, 8, 8), 40, 2)
    operands = [numbers((1, 2, 40, 8), i) for i in range(3)]
    bias = torch.zeros(1, 1, 40, 40)
    bias[..., 3, :] = -torch.inf  # no mask: nothing is excluded, and there is no softmax
    (y, _), (wanted, _) = both_ways(module, operands, Call(never, bias=bias))
    assert torch.equal(y, wanted) and (y[:, 3] == 0).all() and (y[:, 4] != 0).any()


@pytest.mark.parametrize("what", ["gradient", "dropout", "float64", "no keys", "three heads", "vmap"])
def test_what_is_not_for_the_kernel_goes_to_torch(what: str) -> None:
    kernels.use("c")
    module = frozen((2, 2, 8, 8), 5, 3)
    taken = noted(module)
    operands = [numbers((1, 2, 5, 8), i) for i in range(3)]
    call = Call(never, dropout=0.5 if what == "dropout" else 0.0)
    with torch.set_grad_enabled(what == "gradient"):
        if what == "float64":
            y = module.double()(*(u.double() for u in operands), call)[0]
        elif what == "vmap":
            y = torch.func.vmap(lambda *own: module(*own, call)[0])(*(u[None] for u in operands))
        elif what == "no keys":
            y = module(operands[0], *(u[:, :, :0] for u in operands[1:]), call)[0]
        elif what == "three heads":
            with pytest.raises(RuntimeError):
                module(numbers((1, 3, 5, 8), 0), *operands[1:], call)
            y = torch.zeros(1)
        else:
            y = module(*operands, call)[0]
    kernels.use()
    assert taken == [False] and y.isfinite().all() and y.requires_grad == (what == "gradient")


# ---- whole models ----


@pytest.mark.parametrize("packed", [False, True], ids=["frozen", "packed"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit"])
def test_whole_models_give_the_same_numbers(name: str, implementation: str, packed: bool) -> None:
    model = binarize_model(build(name, implementation), quick(attention="binarize"))
    train(model, CASES[name], 0, 4, 4)
    model = (pack_model(model) if packed else model).eval()
    batch = CASES[name].batch(3)
    kernels.use("c")
    taken = [noted(module) for module in attentions(model).values()]
    found = logits(model, batch)
    assert taken and all(calls == [True] for calls in taken)
    with kernels.switched_off():
        assert torch.equal(found, logits(model, batch))
    kernels.use()


@pytest.mark.parametrize("packed", [False, True], ids=["frozen", "packed"])
def test_decoding_with_a_cache_gives_the_same_numbers(packed: bool) -> None:
    model = binarize_model(build("llama"), quick(attention="binarize"))
    train(model, CASES["llama"], 0, 4, 4)
    model = (pack_model(model) if packed else model).eval()
    assert all(module.heads > module.key_heads for module in attentions(model).values())
    prompt = CASES["llama"].batch(3)["input_ids"][:, :3]

    def decode() -> list[Tensor]:
        cache, scores, ids = None, [], prompt
        for _ in range(6):
            with torch.no_grad():
                output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
            scores.append(output.logits)
        return scores

    kernels.use("c")
    found = decode()
    with kernels.switched_off():
        assert all(torch.equal(a, b) for a, b in zip(found, decode(), strict=True))
    kernels.use()

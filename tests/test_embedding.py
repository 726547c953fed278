"""BinaryEmbedding: rows and gradients against the slow reference, padding, and which tables stay real."""

import logging
from typing import Any

import pytest
import reference
import torch
import transformers as hf
import vision
from models import CASES, logits, quick
from test_attention import assert_close
from torch import Tensor, nn

from stompp_hf import BinaryEmbedding, StoMPPConfig, binarize_model, get_plan, restore_model
from stompp_hf.modules import FROZEN, TRANSITION

ROWS, SIZE, PADDING = 6, 4, 2
IDS = torch.tensor([[0, 1, 1, 5], [2, 0, 3, 2]])  # 4 is never named, 0, 1 and padding are named twice
EMBEDDINGS = {"embeddings": "binarize"}
NO_SCALE = {"weight_scale": "none", "learn_weight_scale": False}


def build(padding: int | None, zero: bool, **options: Any) -> BinaryEmbedding:
    """A calibrated float64 table with zeros of both signs and values at the clip's edges."""
    torch.manual_seed(0)
    table = nn.Embedding(ROWS, SIZE, padding_idx=padding).double()
    with torch.no_grad():
        table.weight[0] = torch.tensor([0.0, -0.0, 0.4, -0.4])
        table.weight[PADDING] = 0.0 if zero else torch.tensor([0.3, -0.3, 0.1, 0.2])
    layer = BinaryEmbedding.convert(table, StoMPPConfig(**options))
    layer.calibrate_weight()
    return layer


def freeze(layer: BinaryEmbedding, state: str) -> Tensor:
    """Enter a state; returns the mask."""
    layer.enter(state, 1.0 if state == FROZEN else 0.5)
    assert layer.masked_tensors() == {"weight_mask": (ROWS, SIZE)}
    if state == FROZEN:
        return torch.ones(ROWS, SIZE)
    layer.weight_mask = (torch.rand(ROWS, SIZE, generator=torch.Generator().manual_seed(1)) < 0.5).double()
    return layer.weight_mask


@pytest.mark.parametrize("options", [{}, {"weight_scale": "tensor"}, {"weight_clip": 0.4}, NO_SCALE], ids=str)
@pytest.mark.parametrize("padding", [None, "zeros", "words"])
@pytest.mark.parametrize("state", [TRANSITION, FROZEN])
@pytest.mark.parametrize("surrogate", ["zero", "ste", "clipped_ste", "windowed_ste"])
def test_rows_and_gradients(surrogate: str, state: str, padding: str | None, options: dict[str, Any]) -> None:
    layer = build(None if padding is None else PADDING, padding == "zeros", frozen_gradient=surrogate, **options)
    mask = freeze(layer, state)
    scales = layer.weight_scale.detach().expand(ROWS).tolist()
    if padding == "zeros":
        scales[PADDING] = 0.0
    weight, c = layer.weight.detach().tolist(), layer.weight_clip.item()
    rows = layer(IDS)
    assert_close(rows, exactly(reference.mix_weight(weight, scales, mask.tolist(), c))[IDS])
    g = torch.randn(rows.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rows.backward(g)

    summed = torch.zeros(ROWS, SIZE, dtype=torch.float64)
    for place, row in enumerate(IDS.flatten().tolist()):
        if padding is None or row != PADDING:
            summed[row] += g.flatten(0, 1)[place]
    grad_w, grad_s = reference.mix_weight_gradients(summed.tolist(), weight, mask.tolist(), c, surrogate)
    assert_close(layer.weight.grad, exactly(grad_w))
    if options is NO_SCALE:
        assert layer.weight_scale.grad is None
    else:
        grad = exactly(grad_s)
        assert_close(layer.weight_scale.grad, grad if layer.weight_scale.numel() > 1 else grad.sum().reshape(1))
    if state == FROZEN and surrogate == "zero":
        assert layer.weight.grad is None  # undefined, not zeros


def exactly(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize("scale", ["channel", "tensor"])
def test_starting_scales_and_exactly_two_values(scale: str) -> None:
    layer = build(PADDING, True, weight_scale=scale)
    freeze(layer, FROZEN)
    mean = layer.weight.detach().abs().mean(1) if scale == "channel" else layer.weight.detach().abs().mean().reshape(1)
    torch.testing.assert_close(layer.weight_scale.detach(), mean)
    table, found = layer.binary_weight(), layer(torch.arange(ROWS)).detach()
    assert torch.equal(table, found)
    for row in range(ROWS):
        s = layer.weight_scale[row if scale == "channel" else 0].item()
        wanted = [0.0] * SIZE if row == PADDING else [s if w >= 0 else -s for w in layer.weight[row].tolist()]
        assert found[row].tolist() == wanted
    assert found[0].tolist()[:2] == [layer.weight_scale[0].item()] * 2  # zeros of both signs


def test_pending_is_the_plain_table_and_clips_where_a_clip_is_set() -> None:
    plain = build(PADDING, False).weight.detach()
    assert torch.equal(build(PADDING, False)(IDS), plain[IDS])
    assert torch.equal(build(PADDING, False, weight_clip=0.25)(IDS), plain.clamp(-0.25, 0.25)[IDS])
    nothing = build(PADDING, False, binarize="nothing", weight_clip=0.25)
    assert torch.equal(nothing(IDS), plain[IDS])


@pytest.mark.parametrize("binarize", ["weights", "weights_and_activations"])
def test_it_has_no_binary_input(binarize: str) -> None:
    layer = build(None, False, binarize=binarize)
    assert not layer.needs_activation_values and layer.activation_scale is None
    assert [name for name, _ in layer.named_parameters()] == ["weight", "weight_scale"]
    assert type(layer.restore()) is nn.Embedding and [*layer.state_dict()] == ["weight"]


# ---- in models ----


def left(model: Any, name: str, caplog: pytest.LogCaptureFixture) -> str:
    with caplog.at_level(logging.WARNING, "stompp_hf"):
        binarize_model(model, quick(**EMBEDDINGS))
    assert not any(isinstance(module, BinaryEmbedding) for module in model.modules())
    reason = get_plan(model).left[name]
    assert any(name in r.message and reason in r.message for r in caplog.records)  # it was asked for: no silence
    return reason


def test_tables_that_stay_real_say_why(caplog: pytest.LogCaptureFixture) -> None:
    assert left(CASES["gpt2"].build(), "transformer.wte", caplog) == "its weight is tied to lm_head"
    assert "tied to encoder.embed_tokens, decoder.embed_tokens, lm_head" in left(CASES["t5"].build(), "shared", caplog)
    assert "BartScaledWordEmbedding is no nn.Embedding" in left(CASES["bart"].build(), "model.shared", caplog)
    vit = vision.CASES["vit"].build()
    assert "ViTPatchEmbeddings is no nn.Embedding" in left(vit, "vit.embeddings.patch_embeddings", caplog)
    excluded = binarize_model(CASES["bert"].build(), quick(**EMBEDDINGS, exclude_modules=["word_embeddings"]))
    assert "exclude_modules" in get_plan(excluded).left["bert.embeddings.word_embeddings"]
    for option in ({"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}):
        assert next(iter(option)) in str(BinaryEmbedding.unfit(nn.Embedding(4, 4, **option)))


def test_an_untied_table_of_a_decoder_becomes_binary_in_a_bwn_too() -> None:
    case = CASES["llama"]
    for binarize in ("weights", "weights_and_activations"):
        model = binarize_model(case.build(), quick(**EMBEDDINGS, binarize=binarize))
        assert isinstance(model.model.embed_tokens, BinaryEmbedding)
        assert torch.equal(logits(model, case.batch()), logits(case.build(), case.batch()))
        assert type(restore_model(model).model.embed_tokens) is nn.Embedding


def test_untying_makes_a_table_fit() -> None:
    config = hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, eos_token_id=2, tie_word_embeddings=False)
    model = binarize_model(hf.AutoModelForCausalLM.from_config(config), quick(**EMBEDDINGS))
    assert get_plan(model).of_kind("embedding") == ["transformer.wte"]

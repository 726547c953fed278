"""Binary attention and embeddings on the way: masks, values, recomputation, what may not move, decoding."""

import copy
import math

import pytest
import torch
from beyond import (
    BERT,
    BOTH,
    CASES,
    LLAMA,
    MIDDLE,
    SELF,
    STEPS,
    assert_two_levels,
    attentions,
    build,
)
from models import logits, quick, same_tensors, train

from stompp_hf import (
    BinaryAttention,
    BinaryEmbedding,
    Progression,
    StoMPPConfig,
    binarize_model,
    calibrate,
    parameter_groups,
    restore_model,
)
from stompp_hf.errors import NotCalibratedError
from stompp_hf.modules.attention import SITES, SLOTS
from stompp_hf.training.distillation import snapshot

# ---- masks, calibration, and what may not move ----


def test_recomputed_activations_change_nothing() -> None:
    results = []
    for recompute in (False, True):
        model = binarize_model(build("bert"), quick(**BOTH))
        if recompute:
            model.activation_checkpointing_enable()
        results.append((train(model, BERT, 0, STEPS, STEPS), model.state_dict()))
    assert results[0][0] == results[1][0] and same_tensors(results[0][1], results[1][1]) == []


def test_left_padding_in_the_example_is_no_reason_to_refuse() -> None:
    inputs = {"input_ids": torch.arange(3, 11).repeat(2, 1), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    inputs["attention_mask"][0, :3] = 0
    for implementation in ("sdpa", "eager"):
        model = binarize_model(build("llama", implementation), quick(**BOTH), inputs)
        assert len(attentions(model)) == 2
        train(model, LLAMA, 0, STEPS, STEPS)
        assert torch.isfinite(logits(model, inputs)).all()


def test_masks_track_the_schedule_and_are_a_pure_function_of_the_step() -> None:
    total = 60
    config = StoMPPConfig(**BOTH, refresh_rate=5, order="global", end=1.0, schedule="linear")
    straight, jumped = (Progression(binarize_model(build("bert"), config), total) for _ in range(2))
    entries = shares = 0.0
    for step in range(total + 1):
        straight.step(step)
        p = step / total
        for name, member in straight.layers.items():
            if not isinstance(member, (BinaryAttention, BinaryEmbedding)):
                continue
            assert member.frozen_share == p
            for attribute, shape in member.masked_tensors().items():
                mask = getattr(member, attribute)
                assert (mask is None) == (step == total) or step == 0
                if mask is None:
                    continue
                assert mask.shape == shape and mask.dtype == torch.bool
                spread = math.sqrt(p * (1 - p) / mask.numel())
                assert abs(mask.float().mean() - p) <= 5 * spread, (name, attribute, step)
                entries, shares = entries + mask.numel(), shares + float(mask.sum()) - p * mask.numel()
    assert abs(shares) < 5 * math.sqrt(entries * 5 * 0.25)  # no bias over all steps; a draw lives for five of them
    assert straight.layers[f"{SELF}.binary_attention"].probability_mask is None
    straight.step(33)
    jumped.step(33)
    for name, member in straight.layers.items():
        for attribute in member.mask_names:
            one, two = getattr(member, attribute), getattr(jumped.layers[name], attribute)
            assert (one is None and two is None) or torch.equal(one, two)
    attention = straight.layers[f"{SELF}.binary_attention"]
    assert attention.masked_tensors()["probability_mask"] == (2, SLOTS)
    masks = [getattr(attention, f"{site}_mask").flatten()[:32] for site in SITES]
    assert all(not torch.equal(masks[0], mask) for mask in masks[1:])  # each operand has draws of its own


def test_no_forward_draws_in_eval() -> None:
    for step in (MIDDLE, STEPS):
        model = binarize_model(build("llama"), quick(**BOTH))
        train(model, LLAMA, 0, step, STEPS)
        state = torch.get_rng_state()
        first = logits(model, LLAMA.batch(3))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first, logits(model, LLAMA.batch(3)))


def test_vanilla_ste_starts_binary_and_needs_values() -> None:
    config = StoMPPConfig(**BOTH, check_every=1).as_vanilla_ste()
    model = binarize_model(build("bert"), config)
    Progression(model, STEPS).step(0)
    with pytest.raises(NotCalibratedError):
        logits(model, BERT.batch())
    calibrate(model, [BERT.batch(1), BERT.batch(2)])
    assert all(attention.activation_ready for attention in attentions(model).values())
    assert_two_levels(model, BERT.batch())
    trained = binarize_model(build("bert"), config)
    train(trained, BERT, 0, 2, STEPS)
    assert all(attention.activation_ready for attention in attentions(trained).values())
    with Progression(binarize_model(build("bert"), quick(**BOTH)), STEPS).committed([BERT.batch()]):
        pass


def test_committed_is_put_back() -> None:
    model = binarize_model(build("bert"), quick(**BOTH))
    progression = Progression(model, STEPS)
    progression.step(0)
    before, plain = copy.deepcopy(model.state_dict()), logits(model, BERT.batch())
    with progression.committed([BERT.batch()]):
        assert_two_levels(model, BERT.batch())
    assert same_tensors(model.state_dict(), before) == []
    assert torch.equal(logits(model, BERT.batch()), plain)


@pytest.mark.parametrize("regime", ["zero", "ste"])
def test_frozen_signs_of_the_embedding_are_held(regime: str) -> None:
    model = binarize_model(build("bert"), quick(**BOTH, frozen_gradient=regime))
    progression, table = Progression(model, 40), model.get_input_embeddings()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    progression.attach(optimizer)
    flips = looked = 0
    before = None
    for step in range(40):
        progression.step(step)
        mask = table.weight_mask
        frozen = torch.full_like(table.weight, float(table.stage_state == "frozen")) if mask is None else mask.clone()
        signs = table.weight.detach() >= 0
        if before is not None:
            both = (frozen * before[0]).bool()
            flips, looked = flips + int((both & (signs != before[1])).sum()), looked + int(both.sum())
        before = frozen, signs
        model(**BERT.batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert looked > 10_000 and (flips > 0) == (regime == "ste")


def test_decay_reaches_no_table_scale_or_threshold() -> None:
    model = binarize_model(build("bert"), quick(**BOTH))
    decayed, spared = ({id(p) for p in group["params"]} for group in parameter_groups(model, 0.1))
    table = model.get_input_embeddings()
    own = [*attentions(model)[f"{SELF}.binary_attention"].parameters(), table.weight, table.weight_scale]
    assert len(own) == 8 + 2 and all(id(parameter) in spared - decayed for parameter in own)


def test_decoding_with_a_cache_gives_the_same_scores() -> None:
    for name in ("gpt2", "llama"):
        model = binarize_model(build(name), quick(**BOTH))
        train(model, CASES[name], 0, STEPS, STEPS)
        ids = CASES[name].batch(5)["input_ids"][1:]
        model.eval()
        with torch.no_grad():
            whole, cache, parts = model(input_ids=ids).logits, None, []
            for position in range(ids.shape[1]):
                output = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_a_snapshot_of_a_frozen_model_is_real_everywhere() -> None:
    model = binarize_model(build("bert"), quick(**BOTH))
    train(model, BERT, 0, STEPS, STEPS)
    teacher = snapshot(model)
    plain = restore_model(copy.deepcopy(model))
    assert torch.equal(logits(teacher, BERT.batch()), logits(plain, BERT.batch()))
    assert not torch.equal(logits(model, BERT.batch()), logits(plain, BERT.batch()))

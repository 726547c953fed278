"""Whole models with binary attention and embeddings: start, order, end, and saving on the way."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from beyond import (
    BERT,
    BOTH,
    CASES,
    MIDDLE,
    MODULES,
    SELF,
    STEPS,
    WORDS,
    assert_two_levels,
    attentions,
    build,
    every_case,
)
from models import first_calls, logits, quick, same_tensors, train
from train_and_die import arguments, rows
from transformers import AutoModel, Trainer

from stompp_hf import (
    BinaryEmbedding,
    Progression,
    StoMPPTrainerCallback,
    binarize_model,
    get_plan,
    report,
    restore_model,
)
from stompp_hf.surgery.attention_interface import _still_asked
from stompp_hf.surgery.members import members

# ---- the start, and the plan ----


@every_case
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_nothing_changes_at_the_start(name: str, implementation: str) -> None:
    batch, plain, model = CASES[name].batch(), build(name, implementation), build(name, implementation)
    parameters = {key: id(parameter) for key, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    assert binarize_model(model, quick(**BOTH)) is model
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert len(attentions(model)) == MODULES[name]
    assert torch.equal(logits(model, batch), logits(plain, batch))
    outputs = []
    for network in (model, plain):  # with dropout
        torch.manual_seed(1)
        outputs.append(network(**batch))
        outputs[-1].loss.backward()
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    gradients = {key: parameter.grad for key, parameter in plain.named_parameters()}
    after = dict(model.named_parameters())
    assert {key: id(after[key]) for key in parameters} == parameters
    for key, gradient in gradients.items():
        assert (after[key].grad is None) == (gradient is None) or key == WORDS.get(name)
        assert gradient is None or torch.equal(after[key].grad, gradient)

    other = build(name, implementation, seed=1)
    model.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(logits(model, batch), logits(other, batch))


@every_case
def test_attention_freezes_between_its_projections(name: str) -> None:
    layers = first_calls(build(name), CASES[name].batch())
    model = binarize_model(build(name), quick(**BOTH, stages="module"))
    plan = get_plan(model)
    order = [entry.name for entry in plan.entries]
    assert order == [*members(model)] and len(plan.of_kind("attention")) == MODULES[name]
    assert plan.stage_count == len(order) and plan.stage_names == order
    assert [e.position for e in plan.entries] == sorted(e.position for e in plan.entries)
    assert len({entry.position for entry in plan.entries}) == len(order)
    assert plan.of_kind("embedding") == ([WORDS[name]] if name in WORDS else [])
    if name in WORDS:
        assert order[0] == WORDS[name]
    kept = plan.of_kind("layer")
    assert kept == [layer for layer in layers if layer in kept]
    for entry in plan.of_kind("attention"):
        parent = entry.rpartition(".")[0]
        around = [n for n in order if n.startswith(parent + ".") or n == parent.replace("attention", "o_proj")]
        place = order.index(entry)
        own = [order.index(n) for n in around if n != entry]
        outputs = [i for i in own if order[i].rpartition(".")[2] in ("c_proj", "o_proj", "o", "out_proj")]
        inputs = [i for i in own if i not in outputs]
        assert inputs and max(inputs) < place
        assert not outputs or place < min(outputs)
        if name == "bert":
            assert order[place + 1] == parent.replace(".self", ".output.dense")


def test_in_block_stages_attention_is_with_its_block_and_the_embedding_with_the_first() -> None:
    for order in ("forward", "reverse"):
        plan = get_plan(binarize_model(build("bert"), quick(**BOTH, order=order)))
        stage = {entry.name: entry.stage_name for entry in plan.entries}
        assert plan.stage_count == 2
        assert stage[WORDS["bert"]] == stage[f"{SELF}.binary_attention"] == "bert.encoder.layer.0"
        assert stage[f"{SELF.replace('0', '1')}.binary_attention"] == "bert.encoder.layer.1"
    numbered = get_plan(binarize_model(build("bert"), quick(**BOTH, stages=3)))
    assert [entry.stage for entry in numbered.entries] == [0] * 5 + [1] * 5 + [2] * 5


def test_the_report_says_what_became_binary() -> None:
    text = report(binarize_model(build("bert"), quick(**BOTH)))
    assert text.startswith("12 binary layers in 2 stages")
    assert "attention products in 2 modules (queries, keys, values in {-a, a}, probabilities in {0, 2a})" in text
    assert f"the word embedding: {WORDS['bert']}" in text and "attention.self.binary_attention" in text
    words = 100 * 32
    layers = 2 * (4 * 32 * 32 + 2 * 32 * 48)
    assert f"{words + layers:,} of " in text
    plain = report(binarize_model(build("bert"), quick()))
    assert "attention products" not in plain and "word embedding" not in plain


# ---- from the start to the end, with everything saved on the way ----


@every_case
def test_training_to_the_end_and_saving_on_the_way(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, batch = binarize_model(build(name), quick(**BOTH)), case.batch(77)
    losses = train(model, case, 0, MIDDLE, STEPS)
    states = {attention.stage_state for attention in attentions(model).values()}
    assert "transition" in states
    middle = logits(model, batch)
    model.save_pretrained(tmp_path / "middle")
    text = (tmp_path / "middle" / "config.json").read_text()
    assert "stompp_sdpa" not in text and "attn_implementation" not in text
    reloads = [case.auto.from_pretrained(tmp_path / "middle") for _ in range(2)]
    assert reloads[0].config._attn_implementation == "stompp_sdpa"
    assert torch.equal(logits(reloads[0], batch), middle)
    assert same_tensors(reloads[0].state_dict(), model.state_dict()) == []
    assert get_plan(reloads[0]) == get_plan(model)
    losses += train(model, case, MIDDLE, STEPS, STEPS)
    for reload in reloads:
        assert train(reload, case, MIDDLE, STEPS, STEPS) == losses[MIDDLE:]
        assert same_tensors(reload.state_dict(), model.state_dict()) == []

    assert all(math.isfinite(loss) for loss in losses) and Progression(model, STEPS).is_complete()
    for attention in attentions(model).values():
        assert attention.stage_state == "frozen" and attention.query_mask is None and attention.activation_ready
    assert_two_levels(model, batch)
    if name in WORDS:
        table = model.get_input_embeddings()
        assert isinstance(table, BinaryEmbedding) and table.stage_state == "frozen"
        found = table(torch.arange(table.num_embeddings))
        levels = torch.where(table.weight >= 0, 1.0, -1.0) * table.weight_scale[:, None]
        keep = torch.arange(table.num_embeddings) != (-1 if table.padding_idx is None else table.padding_idx)
        assert torch.equal(found[keep], levels[keep]) and torch.equal(table.binary_weight(), found)
    end = logits(model, batch)
    model.save_pretrained(tmp_path / "end")
    assert torch.equal(logits(case.auto.from_pretrained(tmp_path / "end"), batch), end)


def test_eager_attention_comes_back_as_such_and_gives_binary_probabilities(tmp_path: Path) -> None:
    model, batch = binarize_model(build("bert", "eager"), quick(**BOTH)), BERT.batch(7)
    train(model, BERT, 0, MIDDLE, STEPS)
    model.save_pretrained(tmp_path)
    reload = BERT.auto.from_pretrained(tmp_path)
    assert reload.config._attn_implementation == "stompp_eager"
    assert torch.equal(logits(reload, batch), logits(model, batch))
    base = AutoModel.from_pretrained(tmp_path)  # without its prefix
    assert len(attentions(base)) == 2 and isinstance(base.embeddings.word_embeddings, BinaryEmbedding)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        assert torch.equal(base(**inputs).pooler_output, model.eval().bert(**inputs).pooler_output)
    with torch.no_grad():  # the first of two stages is frozen, the second not yet
        first, second = model.eval()(**inputs, output_attentions=True).attentions
    assert len(first[:, 0].unique()) == 2 and len(second[:, 0].unique()) > 10


def test_trainer_runs_it_with_a_checkpoint(tmp_path: Path) -> None:
    model = binarize_model(build("bert"), quick(**BOTH))
    args = arguments(tmp_path, save_strategy="no")
    Trainer(model, args, train_dataset=rows(), callbacks=[StoMPPTrainerCallback()]).train()
    assert {member.stage_state for member in members(model).values()} == {"frozen"}
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(BERT.auto.from_pretrained(tmp_path / "out"), BERT.batch()), logits(model, BERT.batch()))


def test_restoring_leaves_nothing_behind(tmp_path: Path) -> None:
    model, plain = binarize_model(build("bert", "eager"), quick(**BOTH)), build("bert", "eager")
    assert [*model.get_submodule(SELF)._forward_pre_hooks.values()] == [_still_asked]
    restore_model(model)
    assert model.config._attn_implementation == "eager" and not attentions(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert not any(_still_asked in m._forward_pre_hooks.values() for m in model.modules())
    assert [*model.state_dict()] == [*plain.state_dict()]
    assert torch.equal(logits(model, BERT.batch()), logits(plain, BERT.batch()))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    binarize_model(model, quick(**BOTH))
    assert len(attentions(model)) == 2


def test_a_copy_shares_nothing() -> None:
    model = binarize_model(build("bert"), quick(**BOTH))
    train(model, BERT, 0, MIDDLE, STEPS)
    twin, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    assert torch.equal(logits(twin, BERT.batch()), logits(model, BERT.batch()))
    train(twin, BERT, MIDDLE, STEPS, STEPS)
    assert same_tensors(model.state_dict(), before) == []
    restore_model(twin)
    assert len(attentions(model)) == 2 and model.config._attn_implementation == "stompp_sdpa"
    train(model, BERT, MIDDLE, STEPS, STEPS)
    assert_two_levels(model, BERT.batch())


def test_a_state_dict_alone_resumes() -> None:
    model = binarize_model(build("bert"), quick(**BOTH))
    train(model, BERT, 0, 7, STEPS)
    fresh = binarize_model(build("bert", seed=5), quick(**BOTH))
    fresh.load_state_dict(model.state_dict(), strict=True)
    Progression(fresh, STEPS).step(7)
    assert torch.equal(logits(fresh, BERT.batch()), logits(model, BERT.batch()))
    assert train(fresh, BERT, 7, STEPS, STEPS) == train(model, BERT, 7, STEPS, STEPS)

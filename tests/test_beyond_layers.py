"""Whole models with binary attention and embeddings: start, order, masks, end, saving, and clear errors."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import vision
from models import first_calls, logits, quick, same_tensors, train
from torch import Tensor, nn
from train_and_die import arguments, rows
from transformers import AutoModel, Trainer

from stompp_hf import (
    BinaryAttention,
    BinaryEmbedding,
    Progression,
    StoMPPConfig,
    StoMPPTrainerCallback,
    binarize_model,
    calibrate,
    get_plan,
    parameter_groups,
    report,
    restore_model,
)
from stompp_hf.attention_interface import _still_asked
from stompp_hf.errors import ConfigError, NotCalibratedError, PatternError
from stompp_hf.modules.attention import SITES, SLOTS, Call
from stompp_hf.plan import members

STEPS, MIDDLE = 12, 5
BOTH = {"attention": "binarize", "embeddings": "binarize"}
BERT, LLAMA, GPT2 = (models.CASES[name] for name in ("bert", "llama", "gpt2"))
CASES = {**{name: models.CASES[name] for name in ("bert", "gpt2", "llama", "t5", "bart")}, "vit": vision.CASES["vit"]}
MODULES = {"bert": 2, "gpt2": 2, "llama": 2, "t5": 6, "bart": 6, "vit": 2}
WORDS = {"bert": "bert.embeddings.word_embeddings", "llama": "model.embed_tokens"}
every_case = pytest.mark.parametrize("name", CASES)
SELF = "bert.encoder.layer.0.attention.self"


def build(name: str, implementation: str = "sdpa", seed: int = 0) -> Any:
    """The model of a case, with attention that is far from uniform."""
    model = CASES[name].build(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(part in key for part in (".query.", ".key.", ".q_proj.", ".k_proj.", ".q.", ".k.", ".c_attn.")):
                parameter *= 8.0
    model.set_attn_implementation(implementation)
    return model


def attentions(model: nn.Module) -> dict[str, BinaryAttention]:
    return {name: m for name, m in model.named_modules() if isinstance(m, BinaryAttention)}


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


def assert_two_levels(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """What multiplies values is 0 or twice the head's scale, and both occur; padded keys get 0."""
    seen: list[tuple[BinaryAttention, Tensor]] = []

    def ask(module: BinaryAttention, args: Any) -> Any:
        query, key, value, call = args
        return query, key, value, Call(**{**vars(call), "wants_weights": True})

    def note(module: BinaryAttention, args: Any, output: Any) -> None:
        seen.append((module, output[1]))

    handles = [a.register_forward_pre_hook(ask) for a in attentions(model).values()]
    handles += [a.register_forward_hook(note) for a in attentions(model).values()]
    logits(model, batch)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(attentions(model))
    for module, weights in seen:
        for head in range(module.heads):
            levels = {0.0, 2 * module.probability_scale[head].item()}
            assert set(weights[:, head].unique().tolist()) <= levels
        assert 0 < (weights > 0).float().mean() < 1
    if "attention_mask" in batch and len(seen) == 2:
        hidden = batch["attention_mask"] == 0
        assert all((weights[hidden[:, None, None, :].expand_as(weights)] == 0).all() for _, weights in seen)


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


# ---- masks, calibration, and what may not move ----


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
                assert mask.shape == shape and set(mask.unique().tolist()) <= {0.0, 1.0}
                assert abs(mask.mean() - p) <= 5 * math.sqrt(p * (1 - p) / mask.numel()), (name, attribute, step)
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


# ---- what cannot be ----


def unchanged(model: nn.Module, plain: nn.Module) -> None:
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert [*model.state_dict()] == [*plain.state_dict()] and not hasattr(model, "stompp_plan")
    assert model.config._attn_implementation == plain.config._attn_implementation


def test_attention_of_its_own_kind_is_named_before_anything_is_converted() -> None:
    case = models.CASES["deberta-v2"]
    model = case.build()
    message = r"2 modules cannot have it: deberta.encoder.layer.0.attention.self \(it computes.*attention='keep'"
    with pytest.raises(ConfigError, match=message):
        binarize_model(model, quick(**BOTH))
    unchanged(model, case.build())
    binarize_model(model, quick(**BOTH, exclude_modules=["attention.self"]))
    assert not attentions(model) and "exclude_modules" in get_plan(model).left[
        "deberta.encoder.layer.1.attention.self.binary_attention"
    ]  # fmt: skip


def test_attention_can_be_excluded_block_by_block() -> None:
    model = binarize_model(build("bert"), quick(**BOTH, exclude_modules=["layer.1.attention.self.binary_attention"]))
    assert [*attentions(model)] == [f"{SELF}.binary_attention"]
    train(model, BERT, 0, STEPS, STEPS)
    assert attentions(model)[f"{SELF}.binary_attention"].stage_state == "frozen"
    with pytest.raises(PatternError, match="binary_attentions"):
        binarize_model(build("bert"), quick(**BOTH, exclude_modules=["binary_attentions"]))


def test_attention_without_an_interface() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.blocks[0](x))

    with pytest.raises(ConfigError, match=r"inputs could be made.*example_inputs"):
        binarize_model(Plain(), quick(attention="binarize", first_layer="binarize"))
    with pytest.raises(ConfigError, match=r"uses none.*attn_implementation='sdpa'"):
        binarize_model(Plain(), quick(attention="binarize", first_layer="binarize"), torch.randn(2, 8))
    resnet = vision.CASES["resnet"].build()
    with pytest.raises(ConfigError, match=r"ResNetForImageClassification.*no attention that goes through"):
        binarize_model(resnet, quick(attention="binarize"))
    assert resnet.config._attn_implementation in ("sdpa", "eager") and not hasattr(resnet, "stompp_plan")


def test_other_implementations_and_recorded_attentions_are_refused() -> None:
    model = build("bert")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match=r"sdpa or eager.*uses flash_attention_2.*Load it with"):
        binarize_model(model, quick(**BOTH))
    model = build("bert", "eager")
    model.config.output_attentions = True
    with pytest.raises(ConfigError, match=r"output_attentions=True.*when calling"):
        binarize_model(model, quick(**BOTH))


def test_a_name_that_the_model_itself_looks_at_is_noticed() -> None:
    model = build("bert")
    model.classifier.register_forward_hook(
        lambda module, args, out: out + (model.config._attn_implementation == "sdpa")
    )
    with pytest.raises(ConfigError, match=r"depends on the name of its attention implementation"):
        binarize_model(model, quick(**BOTH))
    assert model.config._attn_implementation == "sdpa" and not attentions(model)


def test_attention_that_is_more_than_a_softmax_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.models.bert.modeling_bert as file

    def capped(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        output, weights = original(module, query, key, value, *rest, **options)
        return torch.tanh(output), weights

    original = file.eager_attention_forward
    model = build("bert", "eager")
    for layer in model.bert.encoder.layer:
        layer.attention.self.value.weight.data *= 30
    monkeypatch.setattr(file, "eager_attention_forward", capped)
    with pytest.raises(ConfigError, match=r"it is not softmax\(q k\^T \+ mask\) v"):
        binarize_model(model, quick(**BOTH))


def test_an_implementation_chosen_afterwards_is_no_silent_end_of_binary_attention() -> None:
    model = binarize_model(build("bert"), quick(**BOTH))
    model.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match=r"changed to 'eager' after binarize_model.*restore_model"):
        logits(model, BERT.batch())


def test_a_failure_halfway_leaves_the_model_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    begin = BinaryAttention.__init__

    def fail_second(self: Any, *args: Any) -> None:
        made.append(self)
        if len(made) == 2:
            raise RuntimeError("no memory")
        begin(self, *args)

    monkeypatch.setattr(BinaryAttention, "__init__", fail_second)
    model = build("bert")
    with pytest.raises(RuntimeError, match="no memory"):
        binarize_model(model, quick(**BOTH))
    assert len(made) == 2
    unchanged(model, build("bert"))
    assert not any(_still_asked in m._forward_pre_hooks.values() for m in model.modules())


def test_full_precision_on_the_same_path() -> None:
    model, plain = binarize_model(build("bert"), quick(**BOTH).as_full_precision()), build("bert")
    train(model, BERT, 0, 3, STEPS)
    assert {member.stage_state for member in members(model).values()} == {"pending"}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(model.get_parameter(name))
    assert torch.equal(logits(model, BERT.batch()), logits(plain, BERT.batch()))

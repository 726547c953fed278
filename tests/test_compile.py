"""torch.compile: results equal eager ones, one graph a class of block and state, and never eager in silence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from models import CASES
from torch import Tensor, nn
from torch._dynamo.utils import counters
from train_and_die import arguments, rows
from transformers import Trainer

from stompp_hf import Progression, StoMPPConfig, StoMPPTrainerCallback, binarize_model, calibrate
from stompp_hf.errors import ConfigError
from stompp_hf.training.distillation import Distiller, snapshot

TOTAL = 12
BERT = CASES["bert"]


@pytest.fixture(autouse=True)
def fresh():
    """No graphs of other tests, and torch's settings as they were."""
    torch._dynamo.reset()
    counters.clear()
    before = torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit
    yield
    assert (torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit) == before
    torch._dynamo.reset()


def bert(regime: str = "windowed_ste", layers: int = 3, **options: Any) -> hf.PreTrainedModel:
    """A BERT of equal blocks without dropout, binarized."""
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    attention = "eager" if regime == "zero" else "sdpa"
    model = hf.AutoModelForSequenceClassification.from_config(config, attn_implementation=attention).train()
    options = {"frozen_gradient": regime, "refresh_rate": 2, "end": 0.75, "check_every": 5, **options}
    return binarize_model(model, StoMPPConfig(**options))


class Graphs:
    """A backend that counts the graphs it is given."""

    def __init__(self, backend: str = "eager") -> None:
        self.count, self.inner = 0, torch._dynamo.lookup_backend(backend)

    def __call__(self, graph: Any, example: list[Tensor]) -> Any:
        self.count += 1
        return self.inner(graph, example)


def train(model: nn.Module, run: Callable[..., Any], progression: Progression) -> list[float]:
    """The whole run; the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    progression.attach(optimizer)
    losses = []
    for step in range(TOTAL):
        progression.step(step)
        loss = run(**BERT.batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    progression.step(TOTAL)
    progression.detach()
    return losses


def plain(*args: Any, **options: Any) -> tuple[hf.PreTrainedModel, list[float]]:
    """The run without compiling."""
    model = bert(*args, **options)
    return model, train(model, model, Progression(model, TOTAL))


def assert_same(left: nn.Module, right: nn.Module, exact: bool = True) -> None:
    """Equal parameters and buffers."""
    for (name, a), b in zip(left.state_dict().items(), right.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=0 if exact else 1e-3, atol=0 if exact else 1e-4, msg=name)


def regional(model: nn.Module, backend: Any) -> nn.Module:
    """Each block compiled by itself."""
    for block in model.bert.encoder.layer:
        block.compile(backend=backend)
    return model


@pytest.mark.parametrize("regime", ["zero", "windowed_ste", "clipped_ste"])
def test_blocks_compiled_one_by_one_need_a_graph_a_state(regime):
    expected, losses = plain(regime)
    graphs = Graphs("aot_eager" if regime == "zero" else "eager")
    model = regional(bert(regime), graphs)
    assert train(model, model, Progression(model, TOTAL)) == losses
    assert_same(expected, model)
    assert graphs.count == 3 and not counters["graph_break"]  # pending, in transition, frozen, for all three blocks


def test_a_whole_compiled_model_needs_a_graph_a_stage_and_stays_compiled():
    layers = 2
    expected, losses = plain(layers=layers)
    model, graphs = bert(layers=layers), Graphs()
    torch._dynamo.config.recompile_limit = limit = 2  # less than the stages need
    try:
        run = torch.compile(model, backend=graphs)
        assert train(model, run, Progression(run, TOTAL)) == losses
        assert torch._dynamo.config.recompile_limit == limit
    finally:
        torch._dynamo.config.recompile_limit = 8
    assert_same(expected, model)
    assert graphs.count >= layers and not counters["graph_break"]


@pytest.mark.parametrize("options", [{"regime": "clipped_ste"}, {"weight_scale": "group", "group_size": 8}])
def test_a_graph_whose_sizes_are_symbolic_from_the_start(options):
    model = bert(layers=2, **options)
    progression = Progression(model, TOTAL)
    progression.step(TOTAL // 2)  # one block is frozen, the other in transition
    calibrate(model, [BERT.batch(0)])
    run, results = torch.compile(model, backend="eager", dynamic=True), []
    for one in (model, run):
        model.zero_grad()
        one(**BERT.batch(1)).loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, msg=name)


def test_gradients_in_units_of_a_length_that_changes():
    results = []
    for compiled in (False, True):
        model = bert(layers=1, scale_gradient="lsq")
        model = regional(model, "eager") if compiled else model
        progression = Progression(model, TOTAL)
        for step in range(TOTAL):
            progression.step(step)
            batch = BERT.batch(step)
            length = 8 - step % 3
            for name in ("input_ids", "attention_mask"):
                batch[name] = batch[name][:, :length]
            model(**batch).loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        progression.detach()
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, msg=name)
    assert sum(name.endswith("_threshold") for name in results[0]) == 6


def test_a_limit_that_is_reached_all_the_same_raises():
    model = bert()
    run = torch.compile(model, backend="eager")
    progression = Progression(run, TOTAL)
    progression._compiled._limit = 1
    with torch._dynamo.config.patch(recompile_limit=1):
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            for step in range(TOTAL):
                progression.step(step)
                run(**BERT.batch(step))
        progression.detach()


def test_steps_that_look_at_activations_run_eager_and_only_those(monkeypatch):
    model = regional(bert(), Graphs())
    progression = Progression(model, TOTAL)
    set_stance, eager, step = torch._dynamo.set_stance, set(), 0

    def noted(stance: str) -> Any:
        eager.add((step, stance))
        return set_stance(stance)

    monkeypatch.setattr(torch._dynamo, "set_stance", noted)
    for step in range(TOTAL):  # `noted` reads it
        progression.step(step)
        model(**BERT.batch(step)).loss.backward()
        assert torch._dynamo.eval_frame._stance.stance == "default"
    progression.detach()
    # Windows [0, 3), [3, 6), [6, 9): values are taken at their first steps; 0, 5 and 10 look for what is not finite.
    assert sorted(eager) == [(step, "force_eager") for step in (0, 3, 5, 6, 10)]


@pytest.mark.parametrize("how", ["wrapper", "in place", "a part"])
def test_nothing_of_torchs_settings_is_left_for_others_after_an_error(how):
    model = bert()
    run = torch.compile(model, backend="eager") if how == "wrapper" else model
    if how != "wrapper":
        (model if how == "in place" else model.bert.encoder).compile(backend="eager")
    progression = Progression(model, TOTAL)  # it is not shown the wrapper, and never detached
    progression.step(0)  # looks, so that the call runs eager
    handle = model.classifier.register_forward_pre_hook(lambda *_: 1 / 0)
    before = torch._dynamo.config.fail_on_recompile_limit_hit
    with pytest.raises(ZeroDivisionError):
        run(**BERT.batch(0))
    assert torch._dynamo.config.fail_on_recompile_limit_hit == before
    graphs = Graphs()
    torch.compile(lambda x: x + 1, backend=graphs)(torch.ones(1))
    assert graphs.count == 1
    handle.remove()
    progression.step(0)
    assert run(**BERT.batch(0)).loss.requires_grad
    assert next(iter(progression.layers.values())).observer.rows


def test_the_check_for_what_is_not_finite_works_beside_graphs():
    from stompp_hf.errors import NonFiniteError

    model = regional(bert(), Graphs())
    progression = Progression(model, TOTAL)
    for step in range(5):
        progression.step(step)
        model(**BERT.batch(step))
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.value.bias.fill_(torch.inf)
    progression.step(5)
    model(**BERT.batch(5))
    with pytest.raises(NonFiniteError, match=r"layer\.0"):
        progression.step(6)
    progression.detach()


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole"])
def test_a_teacher_that_comes_in_mid_run_is_heard_and_leaves_again(whole):
    def taught(compiled: bool) -> tuple[list[float], float]:
        model = bert(start=0.25)
        teacher = snapshot(model)
        run: Any = model
        if compiled:
            run = torch.compile(model, backend="eager") if whole else regional(model, "eager")
        with torch.no_grad():
            for parameter in model.bert.encoder.parameters():
                parameter.mul_(1.1)
        losses = [run(**BERT.batch(0)).loss.item()]  # compiled before there is a teacher
        distiller = Distiller(model, teacher)
        losses += [run(**BERT.batch(0)).loss.item()]
        assert distiller.last.keys() == {"task", "logits", "hidden"}
        distiller.detach()
        return losses, run(**BERT.batch(0)).loss.item()

    expected, found = taught(False), taught(True)
    assert found == expected
    assert expected[0][1] > expected[0][0] == expected[1]


def test_ste_free_with_an_attention_that_torch_cannot_trace_is_refused(tmp_path):
    model = bert("zero")
    model.set_attn_implementation("sdpa")
    Progression(model, TOTAL)  # eager: it works
    with pytest.raises(ConfigError, match=r"sdpa attention without one.*attn_implementation='eager'"):
        Progression(regional(model, "eager"), TOTAL)
    other = bert("zero")
    other.set_attn_implementation("sdpa")
    args = arguments(tmp_path, torch_compile=True, torch_compile_backend="eager", save_strategy="no")
    trainer = Trainer(other, args, train_dataset=rows(8), callbacks=[StoMPPTrainerCallback()])
    with pytest.raises(ConfigError, match="attn_implementation='eager'"):
        trainer.train()


def test_trainer_compiles_the_whole_model(tmp_path):
    losses = []
    for compiled in (False, True):
        args = arguments(
            tmp_path, torch_compile=compiled, torch_compile_backend="eager" if compiled else None,
            save_strategy="no", max_steps=TOTAL, logging_steps=1,
        )  # fmt: skip
        trainer = Trainer(bert(layers=2), args, train_dataset=rows(), callbacks=[StoMPPTrainerCallback()])
        trainer.train()
        losses.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
    assert losses[0] == losses[1] and counters["stats"]["unique_graphs"] > 2


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["zero", "windowed_ste"])
def test_inductor(regime):
    losses = plain(regime)[1]
    graphs = Graphs("inductor")
    model = regional(bert(regime), graphs)
    torch.testing.assert_close(train(model, model, Progression(model, TOTAL)), losses, rtol=1e-3, atol=1e-4)
    assert graphs.count == 3

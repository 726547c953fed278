"""Where attention cannot become binary: clear errors, and models that are left whole."""

from typing import Any

import models
import pytest
import torch
import transformers as hf
import vision
from beyond import BERT, BOTH, SELF, STEPS, attentions, build
from models import logits, quick, train
from torch import Tensor, nn

from stompp_hf import BinaryAttention, StoMPPConfig, binarize_model, get_plan
from stompp_hf.errors import ConfigError, PatternError
from stompp_hf.surgery.attention_interface import _still_asked, watched
from stompp_hf.surgery.members import members

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

    with pytest.raises(ConfigError, match=r"uses none.*attn_implementation='sdpa'"):
        binarize_model(Plain(), quick(attention="binarize", first_layer="binarize"), torch.randn(2, 8))
    resnet = vision.CASES["resnet"].build()
    with pytest.raises(ConfigError, match=r"ResNetForImageClassification.*no attention that goes through"):
        binarize_model(resnet, quick(attention="binarize"))
    assert resnet.config._attn_implementation in ("sdpa", "eager") and not hasattr(resnet, "stompp_plan")


def test_without_a_run_nothing_is_guessed() -> None:
    def small_only(module: nn.Module, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape != (2, 5):
            raise RuntimeError("of another size")

    model = build("bert")
    handle = model.register_forward_pre_hook(small_only, with_kwargs=True)
    with pytest.raises(ConfigError, match=r"no inputs that it runs on.*example_inputs") as caught:
        binarize_model(model, quick(**BOTH))
    assert "of another size" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match="of another size"):
        binarize_model(model, quick(**BOTH), {"input_ids": torch.ones(1, 5, dtype=torch.long)})
    unchanged(model, build("bert"))
    binarize_model(model, quick(**BOTH), {"input_ids": torch.ones(2, 5, dtype=torch.long)})
    handle.remove()
    assert len(attentions(model)) == 2


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


def test_what_bends_large_scores_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.models.bert.modeling_bert as file

    def bent(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        scores = 20.0 * torch.tanh(query.matmul(key.transpose(-1, -2)) * options["scaling"] / 20.0)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        return weights.matmul(value).transpose(1, 2), weights

    monkeypatch.setattr(file, "eager_attention_forward", bent)
    with pytest.raises(ConfigError, match=r"it is not softmax\(q k\^T \+ mask\) v"):
        binarize_model(build("bert", "eager"), StoMPPConfig(attention="binarize"))


def test_a_cap_that_the_model_asks_for_is_known() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = hf.Gemma2Config(**sizes, **heads, attn_logit_softcapping=0.1)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    binarize_model(model, StoMPPConfig(attention="binarize"))
    caps: list[float | None] = []
    with watched(model, lambda module, query, key, value, call: caps.append(call.softcap)):
        model(torch.arange(6)[None])
    assert caps == [0.1]


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

"""binarize_model, restore_model and report: what is converted, what is left and why, and what stays as it was."""

import logging
import time
from collections import Counter
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from models import CASES, logits, quick, same_tensors, train
from torch import nn
from transformers import BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from stompp_hf import (
    BinaryLayer,
    BinaryLinear,
    StoMPPConfig,
    binarize_model,
    get_plan,
    report,
    restore_model,
)
from stompp_hf.errors import (
    AlreadyBinarizedError,
    ConfigError,
    NotBinarizedError,
    NothingToBinarizeError,
    PatternError,
    StoMPPError,
)
from stompp_hf.surgery.members import binary_layers

BERT = CASES["bert"]
BLOCK = ["attention.self.query", "attention.self.key", "attention.self.value"]
BLOCK += ["attention.output.dense", "intermediate.dense", "output.dense"]
IN_ORDER = [f"bert.encoder.layer.{index}.{name}" for index in (0, 1) for name in BLOCK]


def bert() -> BertForSequenceClassification:
    return BERT.build()


def order_of(model: nn.Module) -> list[str]:
    return [entry.name for entry in get_plan(model).entries]


def planned(**options: Any) -> list[tuple[str, int]]:
    """Short names and stages of a BERT binarized with these options."""
    entries = get_plan(binarize_model(bert(), StoMPPConfig(**options))).entries
    return [(entry.name.removeprefix("bert.encoder.layer."), entry.stage) for entry in entries]


def mlp(*middle: nn.Module) -> nn.Sequential:
    """A model without config whose first and last layers stay real."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), *middle, nn.Linear(8, 2))


# ---- errors ----


PATTERN_ERRORS = [
    ({"target_modules": ["query", "querry"]}, "target_modules: 'querry' matches no layer; candidates are bert.encoder"),
    ({"exclude_modules": ["query", "querry"]}, "exclude_modules: 'querry' matches no layer; candidates are bert"),
    ({"order": ["querry", "*"]}, "order: 'querry' matches none of the layers to binarize"),
    ({"order": ["query"]}, r"order: no pattern matches .*key.*end the list with '\*'"),
]


def test_three_mistakes_three_errors() -> None:
    model = binarize_model(bert())
    with pytest.raises(AlreadyBinarizedError, match=r"has binary layers already.*end is 0.5, not 1.0.*restore_model"):
        binarize_model(model, StoMPPConfig(end=1.0))
    with pytest.raises(NothingToBinarizeError, match=r"Left: 14 x a pattern of exclude.*Everything was excluded"):
        binarize_model(bert(), StoMPPConfig(exclude_modules=["bert", "classifier"]))
    with pytest.raises(NothingToBinarizeError, match=r"Embedding has no layer of a type with a binary class.*Linear"):
        binarize_model(nn.Embedding(4, 4))
    with pytest.raises(NothingToBinarizeError, match=r"1 x head.*first_layer='binarize' or head='binarize'"):
        binarize_model(mlp(), example_inputs=torch.ones(1, 8))
    for options, message in PATTERN_ERRORS:
        with pytest.raises(PatternError, match=message):
            binarize_model(bert(), StoMPPConfig(**options))
    with pytest.raises(PatternError, match=r"names only layers that cannot be binarized: lm_head .*tied to"):
        binarize_model(CASES["gpt2"].build(), StoMPPConfig(target_modules=["lm_head"]))
    with pytest.raises(ConfigError, match="needs a StoMPPConfig, not a dict"):
        binarize_model(bert(), {"stages": 3})
    assert len({AlreadyBinarizedError, NothingToBinarizeError, PatternError} & set(StoMPPError.__subclasses__())) == 3


def test_an_error_leaves_the_model_alone() -> None:
    model = bert().bfloat16()
    before = {name: (id(tensor), tensor.dtype) for name, tensor in model.state_dict(keep_vars=True).items()}
    with pytest.raises(PatternError):
        binarize_model(model, StoMPPConfig(target_modules=["querry"]))
    assert {name: (id(t), t.dtype) for name, t in model.state_dict(keep_vars=True).items()} == before
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("broken", ["convert", "_own"])
def test_a_failed_conversion_is_undone(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = bert(), bert()
    original, calls = getattr(BinaryLinear, broken), Counter[str]()

    def fail_later(*args: Any, **kwargs: Any) -> Any:
        calls[broken] += 1
        if calls[broken] == {"convert": 3, "_own": 17}[broken]:  # the third layer, before or in the middle of it
            raise MemoryError("no room")
        return original(*args, **kwargs)

    monkeypatch.setattr(BinaryLinear, broken, fail_later)
    with pytest.raises(MemoryError, match="no room"):
        binarize_model(model)
    monkeypatch.undo()
    assert not any(isinstance(module, BinaryLayer) for module in model.modules())
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not hasattr(model, "stompp_plan") and not hasattr(model.config, "quantization_config")
    assert torch.equal(logits(model, BERT.batch()), logits(plain, BERT.batch()))
    assert len(order_of(binarize_model(model))) == 12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_failed_conversion_leaves_the_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert().to(dtype)
    model.config.dtype = dtype
    model.bert.embeddings.float()  # of two kinds
    before = {name: (id(t), t.dtype, t.clone()) for name, t in model.state_dict(keep_vars=True).items()}

    def fail(*args: Any, **kwargs: Any) -> Any:
        assert model.classifier.weight.dtype == torch.float32
        raise MemoryError("no room")

    monkeypatch.setattr(BinaryLinear, "convert", fail)
    with pytest.raises(MemoryError, match="no room"):
        binarize_model(model)
    after = model.state_dict(keep_vars=True)
    assert model.config.dtype == dtype and after.keys() == before.keys()
    for name, (address, kind, value) in before.items():
        assert (id(after[name]), after[name].dtype) == (address, kind) and torch.equal(after[name], value)


# ---- which layers, in which order and stages ----


def test_targets_excludes_head_and_first_layer() -> None:
    assert planned(target_modules=["query", "layer.1.output.dense"]) == [
        ("0.attention.self.query", 0),
        ("1.attention.self.query", 1),
        ("1.output.dense", 1),
    ]
    # a suffix: the dense layers of attention.output end in output.dense too
    assert not any(name.endswith("output.dense") for name, _ in planned(exclude_modules=["output.dense"]))
    model = binarize_model(bert(), StoMPPConfig(target_modules=["query"], exclude_modules=["layer.1"]))
    assert order_of(model) == ["bert.encoder.layer.0.attention.self.query"]
    left = get_plan(model).left
    assert "target_modules" in left["classifier"] and "target_modules" in left[IN_ORDER[1]]
    assert "exclude_modules" in left["bert.encoder.layer.1.attention.self.query"]

    model = binarize_model(bert(), StoMPPConfig(head="binarize"))
    assert order_of(model) == [*IN_ORDER, "bert.pooler.dense", "classifier"]
    albert = binarize_model(CASES["albert"].build(), StoMPPConfig(first_layer="binarize"))
    assert order_of(albert)[0] == "albert.encoder.embedding_hidden_mapping_in" and len(order_of(albert)) == 7


def test_orders() -> None:
    short = [name.removeprefix("bert.encoder.layer.") for name in IN_ORDER]
    assert planned(stages="module") == [(name, index) for index, name in enumerate(short)]
    assert planned(order="reverse", stages="module") == [(name, index) for index, name in enumerate(short[::-1])]
    assert planned(order="reverse") == [(name, index // 6) for index, name in enumerate(short[::-1])]
    assert planned(order="global") == [(name, 0) for name in short]
    explicit = planned(order=["layer.1", "0.output.*", "query", "*"], stages="module")
    assert [name for name, _ in explicit] == [*short[6:], short[5], short[0], *short[1:5]]
    # An explicit order takes the blocks apart; with stages by block each block is one stage all the same.
    assert planned(order=["query", "*"]) == planned()
    assert planned(order=["layer.1.*.query", "*"]) == [(n, 0) for n in short[6:]] + [(n, 1) for n in short[:6]]


def test_stages() -> None:
    assert Counter(stage for _, stage in planned(stages="module")) == dict.fromkeys(range(12), 1)
    assert Counter(stage for _, stage in planned(stages="block")) == {0: 6, 1: 6}
    assert Counter(stage for _, stage in planned(stages=3)) == {0: 4, 1: 4, 2: 4}
    assert Counter(stage for _, stage in planned(stages="5")) == {0: 3, 1: 2, 2: 3, 3: 2, 4: 2}
    with pytest.raises(ConfigError, match="stages=13 is more than the 12 layers"):
        planned(stages=13)
    assert get_plan(binarize_model(bert(), StoMPPConfig(stages=2))).stage_names == ["part 1 of 2", "part 2 of 2"]

    for within, first, last in (("together", (0, 60), (60, 120)), ("forward", (0, 10), (110, 120))):
        plan = get_plan(binarize_model(bert(), StoMPPConfig(within_stage=within, end=1.0)))
        edges = [(window.begin, window.end) for window in plan.windows(120).values()]
        assert edges[0] == first and edges[-1] == last and edges == sorted(edges)


class Scaled(nn.Linear):
    """A subclass, which may compute something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_layers_that_are_left_with_a_reason() -> None:
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    normed = nn.utils.weight_norm(nn.Linear(8, 8))  # the old one: keeps the class, and the weight is no parameter
    tied, twin, patched, integer, fits = (nn.Linear(8, 8) for _ in range(5))
    twin.weight = tied.weight
    patched.forward = lambda x: x
    integer.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    integer.forward = lambda x: x
    model = mlp(Scaled(8, 8), parametrized, normed, tied, twin, patched, integer, fits)
    before = [type(module) for module in model]
    x = torch.randn(3, 8)
    expected = model(x)
    binarize_model(model, example_inputs=x)
    left = get_plan(model).left
    assert order_of(model) == ["9"] and type(fits) is BinaryLinear
    assert [type(module) for module in model][:9] == before[:9]
    assert left["2"].startswith("Scaled has no binary class (exact types only: ")
    assert left["3"].startswith("ParametrizedLinear has no binary class")
    assert left["4"] == "its weight is parametrized"
    assert left["5"] == "its weight is tied to 6" and left["6"] == "its weight is tied to 5"
    assert left["7"].startswith("its forward was replaced on the instance")
    assert left["8"] == "its weight is stored as torch.int8"
    assert left["0"].startswith("first layer") and left["10"].startswith("head")
    assert torch.equal(model(x), expected)


def test_models_without_config(caplog: pytest.LogCaptureFixture) -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in "dcba":  # registered in the reverse of their order in forward
                self.add_module(name, nn.Linear(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.d(self.c(self.b(self.a(x))))

    x = torch.randn(2, 8)
    with caplog.at_level(logging.WARNING, "stompp_hf"):
        guessed = binarize_model(Backwards())
    assert "no probe of Backwards" in caplog.text and "example_inputs" in caplog.text
    assert order_of(guessed) == ["c", "b"]
    caplog.clear()
    for inputs in (x, (x,), {"x": x}):
        with caplog.at_level(logging.WARNING, "stompp_hf"):
            model = binarize_model(Backwards(), example_inputs=inputs)
        assert order_of(model) == ["b", "c"] and get_plan(model).left.keys() == {"a", "d"} and not caplog.records
    with pytest.raises(RuntimeError, match="shapes"):  # inputs that the user gave must fit
        binarize_model(Backwards(), example_inputs=torch.ones(2, 9))


def test_the_probe_leaves_no_trace() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            x = nn.functional.batch_norm(x, self.norm.running_mean, self.norm.running_var, training=True)
            return self.norm(x) + torch.rand(x.shape)

    model = mlp(Noisy(), nn.Linear(8, 8), nn.BatchNorm1d(8)).train()
    model[3].eval()
    modes = [module.training for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    state = torch.get_rng_state()
    binarize_model(model, example_inputs=torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes
    after = dict(model.named_buffers())
    assert all(torch.equal(after[name], buffer) for name, buffer in buffers.items())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


# ---- what stays as it was ----


def test_ties_hooks_and_optimizers_hold() -> None:
    model = CASES["llama-tied"].build()
    layer = model.model.layers[0].mlp.up_proj
    seen: list[str] = []
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda *_: seen.append("after"))
    layer.weight.register_hook(lambda _: seen.append("gradient"))
    layer.note = "kept"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    binarize_model(model)
    assert type(layer) is BinaryLinear and layer is model.model.layers[0].mlp.up_proj and layer.note == "kept"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = layer.weight.detach().clone()
    model(**CASES["llama-tied"].batch()).loss.backward()
    assert seen[-3:] == ["before", "after", "gradient"]
    optimizer.step()
    assert not torch.equal(layer.weight, before)


def test_restore_gives_the_plain_model_back() -> None:
    model = bert()
    names = list(model.state_dict())
    identities = {name: id(parameter) for name, parameter in model.named_parameters()}
    binarize_model(model, quick())
    train(model, BERT, 0, 5, 12)
    plain = bert()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name in names})
    assert model.config.quantization_config.quant_method == "stompp"
    assert restore_model(model) is model
    assert {type(model.get_submodule(name)) for name in IN_ORDER} == {nn.Linear}
    assert same_tensors(model.state_dict(), plain.state_dict()) == [] and list(model.state_dict()) == names
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == identities
    assert vars(model.get_submodule(IN_ORDER[0])).keys() == vars(plain.get_submodule(IN_ORDER[0])).keys()
    assert torch.equal(logits(model, BERT.batch()), logits(plain, BERT.batch()))
    assert not hasattr(model.config, "quantization_config") and "quantization" not in model.config.to_json_string()
    for function in (restore_model, get_plan, report):
        with pytest.raises(NotBinarizedError, match="binarize_model"):
            function(model)
    assert len(order_of(binarize_model(model))) == 12


def test_half_precision(caplog: pytest.LogCaptureFixture) -> None:
    def half() -> BertForSequenceClassification:
        torch.manual_seed(0)
        return BertForSequenceClassification._from_config(BERT.config(), dtype=torch.bfloat16)

    model, plain = half(), half().float()
    assert model.config.dtype == torch.bfloat16
    identities = [id(parameter) for parameter in model.parameters()]
    with caplog.at_level(logging.WARNING, "stompp_hf"):
        binarize_model(model)
    assert "stored as torch.bfloat16; cast to float32" in caplog.text
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32} == {model.config.dtype}
    assert set(identities) <= {id(parameter) for parameter in model.parameters()}
    assert torch.equal(logits(model, BERT.batch()), logits(plain, BERT.batch()))

    caplog.clear()
    with caplog.at_level(logging.WARNING, "stompp_hf"):
        model = binarize_model(half(), StoMPPConfig(keep_dtype=True))
    assert "keep_dtype=True: latent weights stay torch.bfloat16" in caplog.text
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} == {model.config.dtype}
    assert torch.equal(logits(model, BERT.batch()), logits(half(), BERT.batch()))


def test_report_counts() -> None:
    model = binarize_model(bert())
    binary = 2 * (4 * 32 * 32 + 2 * 32 * 48)
    total = sum(parameter.numel() for parameter in model.parameters())
    lines = report(model).splitlines()
    assert lines[0] == (
        "12 binary layers in 2 stages (weights_and_activations, order forward); "
        f"{binary:,} of {total:,} parameters ({binary / total:.1%}) become binary"
    )
    assert [f"  stage {i + 1} bert.encoder.layer.{i}: {', '.join(BLOCK)}" for i in (0, 1)] == lines[1:3]
    assert lines[3] == "  dropouts that stop once a layer they feed freezes: bert.embeddings.dropout"
    assert len(lines) == 6 and all(line.startswith("  left real: ") for line in lines[4:])
    assert any(line.startswith("  left real: classifier: head") for line in lines)


class OneBlock(nn.Module):
    """A stem, a single block and a head; it has no config, so no inputs can be made for a probe."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)]), nn.Linear(4, 2)


def test_one_block_without_a_probe(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "stompp_hf"):
        plan = get_plan(binarize_model(OneBlock()))
    assert "no probe of OneBlock" in caplog.text
    assert [entry.name for entry in plan.entries] == ["blocks.0"]
    assert plan.left["stem"].startswith("first layer") and plan.left["head"].startswith("head")


# ---- without memory ----


def llama(**shapes: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **shapes))


@pytest.mark.parametrize("binarize", ["weights", "weights_and_activations"])
def test_a_model_on_the_meta_device_is_planned_as_a_real_one(binarize: str) -> None:
    shapes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
    config = StoMPPConfig(binarize=binarize)
    real = binarize_model(llama(**shapes), config)
    with torch.device("meta"):
        meta = llama(**shapes)
    binarize_model(meta, config)
    stages = [[(entry.name, entry.stage) for entry in get_plan(model).entries] for model in (meta, real)]
    assert stages[0] == stages[1] and report(meta) == report(real)
    tensors = [{k: v.shape for k, v in model.state_dict().items()} for model in (meta, real)]
    assert tensors[0] == tensors[1] and all(tensor.is_meta for tensor in meta.state_dict().values())


def test_a_billion_parameters_become_binary_in_seconds() -> None:
    with torch.device("meta"):
        model = llama(vocab_size=128256, hidden_size=2048, num_hidden_layers=16, intermediate_size=8192)
    begin = time.process_time()
    binarize_model(model, StoMPPConfig(binarize="weights"))
    assert time.process_time() - begin < 10
    assert sum(layer.weight_count for layer in binary_layers(model).values()) > 1e9


def test_offloaded_weights_are_refused() -> None:
    model = mlp(nn.Linear(8, 8))
    cpu_offload(model, torch.device("cpu"))
    assert model[2].weight.is_meta
    with pytest.raises(NothingToBinarizeError, match="load the model without offloading"):
        binarize_model(model, example_inputs=torch.randn(3, 8))

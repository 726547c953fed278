"""summary: every total equals a count of its own: formulas by hand, bytes of files, torch's FLOP counter."""

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import vision
from models import CASES, quick, train
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stompp_hf import Progression, StoMPPConfig, binarize_model, kernels, pack_model, restore_model, summary
from stompp_hf.errors import ConfigError
from stompp_hf.modules import BinaryLayer, Member
from stompp_hf.reports.sizes import sizes
from stompp_hf.training.metrics import frozen_fraction

BERT = CASES["bert"]
HIDDEN, INNER, BLOCKS, LENGTH = 32, 48, 2, 8
"""Of the tiny BERT; LENGTH is that of the probe's input."""


def payload(folder: Path) -> int:
    """Bytes of tensors in a folder's safetensors files, without their headers."""
    found = 0
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        found += len(data) - 8 - struct.unpack("<Q", data[:8])[0]
    return found


def saved(model: Any, folder: Path) -> int:
    """Bytes of tensors that save_pretrained writes."""
    model.save_pretrained(folder)
    return payload(folder)


def flops(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Multiply-accumulates by torch's own counter, which counts two FLOPs each, and none of compiled kernels."""
    training = model.training
    model.eval()
    with torch.no_grad(), kernels.switched_off(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    model.train(training)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def valued(model: Any) -> Any:
    """The model with its activation values, whatever they are, taken for those of data."""
    for member in model.modules():
        if isinstance(member, Member):
            member.activation_ready = True
    return model


def ready(model: Any) -> Any:
    """The model with every member frozen."""
    Progression(model, 10).step(10)
    return valued(model)


def bert_parameters(vocab: int, hidden: int, inner: int, blocks: int, positions: int, labels: int) -> dict[str, int]:
    """Parameters of a BERT classifier by the formula: all of them, and the weights of its blocks' linear layers."""
    binary = blocks * (4 * hidden * hidden + 2 * hidden * inner)
    norms, biases = (2 * blocks + 1) * 2 * hidden, blocks * (5 * hidden + inner)
    tables, heads = (vocab + positions + 2) * hidden, hidden * hidden + hidden + labels * hidden + labels
    return {"parameters": binary + norms + biases + tables + heads, "binary": binary}


def bert_macs(length: int, hidden: int, inner: int, blocks: int, labels: int) -> dict[str, int]:
    """Multiply-accumulates of one sequence: linear layers and attention of the blocks; pooler and classifier."""
    layers = blocks * length * (4 * hidden * hidden + 2 * hidden * inner)
    return {"layers": layers, "attention": blocks * 2 * length**2 * hidden, "head": hidden * (hidden + labels)}


# ---- parameters, bytes and multiply-accumulates against counts of their own ----


@pytest.mark.parametrize("beyond", ["keep", "binarize"])
def test_tiny_bert_from_the_start_to_the_packed_file(tmp_path, beyond):
    model, macs = BERT.build(), bert_macs(LENGTH, HIDDEN, INNER, BLOCKS, 3)
    plain = summary(model).totals
    hand = bert_parameters(100, HIDDEN, INNER, BLOCKS, 32, 3)
    assert plain.parameters == hand["parameters"] == sum(p.numel() for p in model.parameters())
    assert plain.stored == plain.float32 == plain.packed == saved(model, tmp_path / "plain")
    assert (plain.binary, plain.macs, plain.macs_1bit, plain.macs_final) == (0, sum(macs.values()), 0, 0)
    assert plain.frozen is None and plain.ratios["compression"] == 1.0

    binarize_model(model, quick(attention=beyond, embeddings=beyond))
    words, products = (100 * HIDDEN, macs["attention"]) if beyond == "binarize" else (0, 0)
    parts = []
    for number, (first, last) in enumerate([(0, 0), (0, 8), (8, 20)]):
        train(model, BERT, first, last, 20)
        totals = summary(model).totals
        assert (totals.parameters, totals.binary) == (hand["parameters"], hand["binary"] + words)
        assert totals.stored == saved(model, tmp_path / str(number)) and totals.float32 == plain.float32
        assert totals.frozen == frozen_fraction(model) and totals.macs == plain.macs
        assert totals.macs_final == macs["layers"] + products
        parts.append(totals)
    assert [part.macs_1bit for part in parts] == [0, (macs["layers"] + products) // 2, macs["layers"] + products]
    pack_model(model)
    packed = summary(model).totals
    assert packed.stored == packed.packed == saved(model, tmp_path / "packed")
    assert {part.packed for part in parts} == {packed.stored}  # known from the start
    assert (packed.parameters, packed.binary, packed.macs) == (hand["parameters"], parts[0].binary, plain.macs)
    assert packed.macs_1bit == parts[-1].macs_1bit and packed.frozen == 1.0
    assert packed.ratios["compression"] == plain.float32 / packed.stored


@pytest.mark.parametrize("case", ["gpt2", "llama-tied", "t5", "deberta-v2", "bart", "albert"])
def test_other_architectures_against_files_and_torchs_counter(tmp_path, case):
    model = CASES[case].build()
    model.set_attn_implementation("eager")  # torch's counter does not know the CPU's fused attention
    for convert in (lambda m: m, lambda m: binarize_model(m, quick()), lambda m: pack_model(ready(m))):
        convert(model)
        found = summary(model, depth="module")
        inputs = {key: value[:1] for key, value in CASES[case].batch().items() if key != "labels"}
        if "decoder_input_ids" in found.inputs:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        assert found.totals.macs == flops(model, inputs) and found.totals.macs > 0
        assert found.totals.stored == saved(model, tmp_path / str(id(convert)))
        assert sum(row.stored for row in found.rows) == found.totals.stored
        model.train()
    assert found.totals.parameters == sum(p.numel() for p in restore_model(model).parameters())


@pytest.mark.parametrize("case", sorted(vision.CASES))
def test_vision_and_speech(tmp_path, case):
    model = vision.CASES[case].build()
    model.set_attn_implementation("eager")
    batch = {k: v for k, v in vision.CASES[case].batch().items() if k not in ("labels", "return_loss")}
    total = flops(model, batch)
    binarize_model(model, quick(relu="rprelu") if "resnet" in case else quick(), example_inputs=batch)
    for part in ("latent", "packed"):
        if part == "packed":
            pack_model(ready(model))
        found = summary(model, batch).totals
        assert found.stored == saved(model, tmp_path / part) and found.macs == total
        assert found.packed == found.stored or part == "latent"


def test_fused_attention_counts_as_eager_attention_does():
    counts = []
    for implementation in ("sdpa", "eager"):
        model = CASES["llama"].build()
        model.set_attn_implementation(implementation)
        counts.append(summary(model).totals.macs)
    assert counts[0] == counts[1] == flops(model, {"input_ids": torch.arange(8)[None]})


def test_grouped_convolutions_by_hand():
    class Net(nn.Module):
        """Three convolutions of 3x3 on 6x6 pixels, in 4 groups, in 1, depthwise; and an nn.MultiheadAttention."""

        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.Sequential(
                nn.Conv2d(8, 16, 3, padding=1, groups=4), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3, groups=16)
            )
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.convs(x).flatten(2).transpose(1, 2)
            return self.attention(x, x, x, need_weights=False)[0]

    net, x = Net().eval(), torch.randn(2, 8, 6, 6)
    found = {row.name: row.macs_real for row in summary(net, x, depth="module").rows}
    assert found["convs.0"] == 2 * 36 * 16 * 2 * 9
    assert found["convs.1"] == 2 * 16 * 16 * 16 * 9
    assert found["convs.2"] == 2 * 4 * 16 * 1 * 9
    attention = 2 * (4 * 16 * 3 * 16 + 2 * 4 * 4 * 16 + 4 * 16 * 16)  # in, scores and values, out
    assert sum(value for name, value in found.items() if name.startswith("attention")) == attention
    assert torch.backends.mha.get_fastpath_enabled()


def test_binary_weights_alone_make_no_product_1bit():
    model = ready(binarize_model(BERT.build(), quick(binarize="weights")))
    found = summary(model)
    block = next(row for row in found.rows if row.name == "bert.encoder.layer.0")
    assert (block.weight_bits, block.activation_bits, block.macs_1bit, block.state) == ([1], [32], 0, "frozen")
    assert found.totals.macs_final == 0 and found.totals.frozen == 1.0


def test_nothing_binary_is_real_and_stays_so(tmp_path):
    model = binarize_model(BERT.build(), quick().as_full_precision())
    Progression(model, 10).step(10)
    totals = summary(model).totals
    assert (totals.binary, totals.macs_final, totals.frozen) == (0, 0, 0.0)
    assert totals.stored == totals.packed == saved(model, tmp_path)


def test_half_precision(tmp_path):
    model = pack_model(ready(binarize_model(BERT.build(), quick()))).to(torch.bfloat16)
    found = summary(model, depth="module")
    assert found.totals.stored == saved(model, tmp_path) and found.totals.macs_1bit > 0
    head = next(row for row in found.rows if row.name == "classifier")
    assert head.weight_bits == head.activation_bits == [16] and head.float32 == 2 * head.stored


FULL: dict[str, Callable[[], Any]] = {
    "bert-base": lambda: hf.BertForSequenceClassification(hf.BertConfig()),
    "resnet-50": lambda: hf.ResNetForImageClassification(hf.ResNetConfig(num_labels=1000)),
}


def by_hand(name: str) -> dict[str, Any]:
    """Parameters, binary weights and multiply-accumulates of the full-size shapes; blocks: those that become 1-bit."""
    if name == "bert-base":
        macs = bert_macs(LENGTH, 768, 3072, 12, 2)
        counts = bert_parameters(30522, 768, 3072, 12, 512, 2)
        return {**counts, "macs": sum(macs.values()), "blocks": [macs["layers"] // 12] * 12}
    weights = {"all": 64 * 3 * 49, "binary": 0}
    macs, blocks = 64 * 3 * 49 * 112**2, []
    channels, before = 64, 64  # of the stem's batch norm; of what enters the first block
    for width, depth, size in ((256, 3, 56), (512, 4, 28), (1024, 6, 14), (2048, 3, 7)):
        inner = width // 4
        for block in range(depth):
            first = size if block or width == 256 else 2 * size  # the 3x3 convolution has the stride
            inside = (before * inner * first**2, 9 * inner * inner * size**2, inner * width * size**2)
            here = before * inner + 9 * inner * inner + inner * width
            shortcut = 0 if block else before * width
            weights["binary"] += here
            weights["all"] += here + shortcut
            blocks.append(sum(inside))
            macs += sum(inside) + shortcut * size**2
            channels += 2 * inner + width + (0 if block else width)
            before = width
    head = 2048 * 1000
    parameters = weights["all"] + 2 * channels + head + 1000
    return {"parameters": parameters, "binary": weights["binary"], "macs": macs + head, "blocks": blocks}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FULL))
def test_full_size_shapes_from_the_start_to_the_packed_file(tmp_path, name):
    with torch.device("meta"):
        shapes = FULL[name]()
    hand = by_hand(name)
    plain = summary(shapes).totals
    assert plain.parameters == hand["parameters"] == {"bert-base": 109_483_778, "resnet-50": 25_557_032}[name]
    model = FULL[name]()
    assert plain.stored == plain.float32 == saved(model, tmp_path / "plain")
    model.set_attn_implementation("eager")
    inputs = {"input_ids": torch.arange(LENGTH)[None]}
    inputs = {"pixel_values": torch.randn(1, 3, 224, 224)} if name == "resnet-50" else inputs
    assert summary(model, inputs).totals.macs == flops(model, inputs) == hand["macs"]
    binarize_model(model, StoMPPConfig())
    progression = Progression(model, 1000)
    first = summary(model, inputs).totals
    for step, part in ((0, "start"), (250, "midway"), (1000, "end")):
        progression.step(step)
        totals = summary(model, inputs).totals
        done = len(hand["blocks"]) - len(progression.unfinished_stages())
        assert part != "midway" or 0 < done < len(hand["blocks"])
        assert totals.macs_1bit == sum(hand["blocks"][:done])
        assert (totals.parameters, totals.binary, totals.macs) == (hand["parameters"], hand["binary"], hand["macs"])
        assert totals.macs_final == sum(hand["blocks"]) and totals.frozen == frozen_fraction(model)
        assert totals.stored == saved(model, tmp_path / part) and totals.packed == first.packed
    assert totals.frozen == 1.0
    pack_model(valued(model))
    packed = summary(model, inputs).totals
    assert packed.stored == first.packed == saved(model, tmp_path / "packed")
    assert packed.macs_1bit == sum(hand["blocks"]) and packed.macs == flops(model, inputs) == hand["macs"]


# ---- nothing is changed, and every state can be looked at ----


def test_nothing_is_changed():
    model = binarize_model(BERT.build(), quick(attention="binarize"))
    train(model, BERT, 0, 8, 20)  # the second stage is in transition
    before = {name: value.clone() for name, value in model.state_dict().items()}
    members = [m for m in model.modules() if isinstance(m, Member)]
    states = [(m.stage_state, m.frozen_share, *m.held_masks().values()) for m in members]
    generator, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    summary(model)
    assert torch.equal(generator, torch.get_rng_state()) and modes == [m.training for m in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    after = [(m.stage_state, m.frozen_share, *m.held_masks().values()) for m in members]
    assert all(all(x is y or x == y for x, y in zip(a, b, strict=True)) for a, b in zip(states, after, strict=True))
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_committed_model_without_activation_values_can_be_looked_at():
    model = binarize_model(BERT.build(), quick())
    Progression(model, 10).step(10)
    layer = next(m for m in model.modules() if isinstance(m, BinaryLayer))
    assert not layer.activation_ready
    assert summary(model).totals.macs_1bit > 0 and not layer.activation_ready


def test_a_wrapped_model():
    model = binarize_model(BERT.build(), quick())
    plain = summary(model).totals
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["classifier"]))
    totals = summary(tuned).totals
    assert (totals.binary, totals.macs_final) == (plain.binary, plain.macs_final)
    assert totals.parameters == plain.parameters + 2 * (HIDDEN + 3)


def test_without_inputs_the_rest_is_there(caplog):
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    found = summary(net)
    assert found.totals.parameters == 8 * 8 + 8 + 8 * 2 + 2 and found.totals.macs is None and found.inputs is None
    assert "example_inputs" in caplog.text and "example_inputs" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["totals"]["share_1bit"] is None
    assert summary(net, torch.randn(3, 8)).totals.macs == 3 * (64 + 16)
    with pytest.raises(RuntimeError, match="shape"):
        summary(net, torch.randn(3, 7))
    with pytest.raises(ConfigError, match="depth='layer' must be"):
        summary(net, depth="layer")  # type: ignore[arg-type]


# ---- rows, what stayed real, and how it is shown ----


def half_way() -> Any:
    """A tiny BERT with one stage frozen and one pending."""
    model = binarize_model(BERT.build(), quick())
    Progression(model, 20).step(8)
    return model


def test_rows_of_blocks_and_modules():
    model = half_way()
    blocks, modules = summary(model), summary(model, depth="module")
    assert blocks.totals == modules.totals and blocks.modules == modules.rows
    rows = {row.name: row for row in blocks.rows}
    first, second = rows["bert.encoder.layer.0"], rows["bert.encoder.layer.1"]
    assert (first.kind, first.weight_bits, first.activation_bits) == ("BertLayer", [1], [1, 32])
    assert (first.state, first.frozen, first.stages, first.macs_1bit) == ("frozen", 1.0, [1], LENGTH * 7168)
    assert (second.state, second.frozen, second.weight_bits) == ("transition", 0.0, [32])
    assert first.macs_real == 2 * LENGTH**2 * HIDDEN  # attention="keep"
    query = next(row for row in modules.rows if row.name == "bert.encoder.layer.0.attention.self.query")
    assert (query.kind, query.shape, query.stages, query.parameters) == ("Linear", [32, 32], [1], 32 * 32 + 32)
    assert rows["classifier"].state == "real" and rows["classifier"].reason.startswith("head")
    mixed = summary(ready_half(model)).rows
    assert next(row for row in mixed if row.name == "bert.encoder.layer.1").state == "mixed"


def ready_half(model: Any) -> Any:
    """The same with one layer of the second stage pending."""
    model.bert.encoder.layer[1].output.dense.enter("pending", 0.0)
    return model


def test_what_stayed_real_and_why():
    found = summary(half_way())
    why = {(real.kind, real.reason.split(":")[0]): real for real in found.real()}
    assert why["Linear", "head"].names == ["bert.pooler.dense", "classifier"]
    assert why["Linear", "head"].parameters == 32 * 32 + 32 + 3 * 32 + 3
    assert why["Embedding", "embeddings='keep'"].names == ["bert.embeddings.word_embeddings"]
    assert len(why["Embedding", "an embedding other than that of words"].names) == 2
    assert len(why["LayerNorm", "its class has no binary form"].names) == 5
    assert (
        why["BertSelfAttention", "products of activations (attention='keep')"].macs == 2 * BLOCKS * LENGTH**2 * HIDDEN
    )
    covered = sum(real.parameters for real in found.real()) + sum(r.parameters for r in found.modules if not r.reason)
    assert covered == found.totals.parameters


def test_text_markdown_dict_and_rich(monkeypatch, capsys):
    found = summary(half_way())
    text, markdown, values = str(found), found.to_markdown(), json.loads(json.dumps(found.to_dict()))
    for words in ("bert.encoder.layer.1", "transition", "20,515 parameters", "head: it runs after", "after pack_model"):
        assert words in text and words in markdown
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(table) == len(found.rows) + 2 and len({line.count("|") for line in table}) == 1
    assert max(map(len, text.splitlines()[: len(found.rows)])) < 160
    assert values["rows"][4]["name"] == "bert.encoder.layer.0" and values["totals"]["macs"] == found.totals.macs
    assert values["totals"]["share_1bit"] == found.totals.macs_1bit / found.totals.macs
    monkeypatch.setenv("COLUMNS", "200")
    found.show()
    shown = capsys.readouterr().out
    assert "bert.encoder.layer.1" in shown and "┃" in shown and "20,515 parameters" in shown
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "rich", None)
    found.show()
    plain = capsys.readouterr().out
    assert plain.startswith(text) and "stompp-hf[rich]" in plain


def test_a_tensor_that_two_modules_share_counts_once():
    model = CASES["t5"].build()
    assert "lm_head" not in sizes(model) and "shared" in sizes(model)
    assert summary(model).totals.parameters == sum(p.numel() for p in model.parameters())

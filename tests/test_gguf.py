"""GGUF files, read back with the package gguf: signs, scales, types, names, vocabulary; and what is refused.

What llama.cpp makes of them: test_llama_cpp.py.
"""

import copy
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf_models
import numpy as np
import peft
import pytest
import torch
import transformers
from gguf_models import CASES, TOKENIZERS, WIDTH, build, byte_level, frozen, sentence_pieces, word_pieces
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import stompp_hf
from stompp_hf import StoMPPConfig, binarize_model, export_gguf, fuse_for_inference, pack_model
from stompp_hf.cli import main
from stompp_hf.errors import ExportError, ExtraError, NonFiniteError, NotBinarizedError, StoMPPError
from stompp_hf.export.gguf_architectures import ARCHITECTURES, paired_rows
from stompp_hf.export.gguf_blocks import BLOCKS, BinaryWeight
from stompp_hf.method.sign_bits import pack_signs, unpack_signs
from stompp_hf.surgery.members import binary_layers

Kind = gguf.GGMLQuantizationType


def tokenizer_of(name: str) -> Any:
    return word_pieces() if name == "bert" else byte_level()


def floats(data: np.ndarray[Any, Any], kind: str) -> Tensor:
    """The numbers that rows of blocks stand for, float32, by the definition of each type."""
    if kind in ("F16", "F32"):
        return torch.from_numpy(data.astype(np.float32))
    size = BLOCKS[kind]
    bytes_ = {"Q1_0": size // 8, "Q4_0": size // 2, "Q8_0": size}[kind]
    blocks = torch.from_numpy(data.copy()).unflatten(1, (-1, 2 + bytes_))
    d, stored = blocks[..., :2].contiguous().view(torch.float16).float(), blocks[..., 2:].contiguous()
    if kind == "Q1_0":
        numbers = torch.stack([(stored[..., j // 8] >> j % 8) & 1 for j in range(size)], -1).float() * 2 - 1
    elif kind == "Q4_0":
        numbers = torch.cat((stored & 15, stored >> 4), -1).float() - 8
    else:
        numbers = stored.view(torch.int8).float()
    return (d * numbers).flatten(1)


def tensors(path: Path) -> dict[str, tuple[str, Tensor]]:
    """Type and numbers of each tensor of a file."""
    found = {t.name: (t.tensor_type.name, t.data) for t in gguf.GGUFReader(path).tensors}
    return {name: (kind, floats(data, kind)) for name, (kind, data) in found.items()}


def names_of(model: Any) -> Callable[[str], str]:
    """The package's name of a tensor in a file."""
    arch = ARCHITECTURES[model.config.model_type].name
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    table = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    return lambda name: table.get_name(name, try_suffixes=(".weight", ".bias"))


def value(path: Path, key: str) -> Any:
    return gguf.GGUFReader(path).fields[key].contents()


# ---- what is written ----


@pytest.mark.parametrize("name", CASES)
def test_round_trip_of_a_packed_checkpoint(name: str, tmp_path: Path) -> None:
    """Signs are the packed checkpoint's, and scales are to float16."""
    tokenizer = tokenizer_of(name)
    model = pack_model(frozen(build(name, tokenizer)))
    model.save_pretrained(tmp_path / "packed")
    saved = load_file(tmp_path / "packed" / "model.safetensors")
    path = export_gguf(model, tmp_path / "model.gguf", tokenizer)
    found, place, layers = tensors(path), names_of(model), binary_layers(model)
    assert len(layers) == sum(kind == "Q1_0" for kind, _ in found.values()) > 0
    for own, layer in layers.items():
        kind, numbers = found[place(f"{own}.weight")]
        signs = unpack_signs(saved[f"{own}.weight_bits"], numbers.shape[1], torch.float32)
        scales = saved[f"{own}.weight_scale"].half().float()[:, None]
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(own.rpartition(".")[2])
        if heads and name.startswith(("llama", "mistral")):  # back from llama.cpp's order of rows
            numbers = numbers.unflatten(0, (getattr(model.config, heads), -1, 2)).transpose(1, 2).flatten(0, 2)
        assert kind == "Q1_0" and torch.equal(numbers, scales * signs)
        assert torch.equal(numbers.sign(), layer.binary_weight().sign().reshape(numbers.shape)) or name == "gpt2"


def test_rows_are_paired_and_back() -> None:
    """Head by head: llama.cpp turns neighbours, transformers i and i + d / 2."""
    order = paired_rows(24, heads=3)
    assert order[:8].tolist() == [0, 4, 1, 5, 2, 6, 3, 7] and sorted(order.tolist()) == list(range(24))
    x = torch.randn(24, 5)
    assert torch.equal(x[order][order.argsort()], x)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("real", ["float16", "float32", "q8_0"])
def test_types_and_values_of_what_is_real(name: str, real: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(name)
    model = frozen(build(name, tokenizer))
    found, place = tensors(export_gguf(model, tmp_path / "model.gguf", tokenizer, real=real)), names_of(model)
    binary = {f"{own}.weight" for own in binary_layers(model)}
    loss = {"F32": 0.0, "F16": 1e-3, "Q8_0": 0.01}
    left = set(found) - {"rope_freqs.weight"}
    for own, parameter in model.named_parameters():
        layer, _, kind_of = own.rpartition(".")
        if own in binary or own.startswith("pooler.") or kind_of.startswith(("weight_", "stompp")):
            left.discard(place(own) if own in binary else "")
            continue
        kind, numbers = found[place(own)]
        left.discard(place(own))
        vector = parameter.dim() == 1 or "position" in own or "token_type" in own or own.startswith("transformer.wpe")
        assert kind == ("F32" if vector else {"float16": "F16", "float32": "F32", "q8_0": "Q8_0"}[real])
        expected = parameter.detach()
        if name.startswith("gemma") and layer.endswith("norm"):
            expected = expected + 1
        if layer.endswith(("q_proj", "k_proj")) and name.startswith("llama"):
            heads = 4 if layer.endswith("q_proj") else 2
            expected = expected[paired_rows(len(expected), heads)]
        assert torch.allclose(numbers.reshape(expected.shape), expected, rtol=0, atol=loss[kind] * expected.abs().max())
    assert not left


def test_forms_of_a_model_give_one_file(tmp_path: Path) -> None:
    """Frozen, packed and fused; and none of them is changed."""
    tokenizer = byte_level()
    model = frozen(build("llama", tokenizer))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    files = [export_gguf(model, tmp_path / "frozen.gguf", tokenizer)]
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    model = pack_model(model)
    files.append(export_gguf(model, tmp_path / "packed.gguf", tokenizer))
    fuse_for_inference(model)
    files.append(export_gguf(model, tmp_path / "fused.gguf", tokenizer))
    assert len({path.read_bytes() for path in files}) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_layers_behind_the_last_stage_stay_real(packed: bool, tmp_path: Path) -> None:
    tokenizer = byte_level()
    model = frozen(build("gpt2", tokenizer), last_stage=1)
    model = pack_model(model) if packed else model
    found, place = tensors(export_gguf(model, tmp_path / "model.gguf", tokenizer, real="float32")), names_of(model)
    layers = binary_layers(model)
    assert {layer.always_real for layer in layers.values()} == {False, True}
    for own, layer in layers.items():
        kind, numbers = found[place(f"{own}.weight")]
        assert kind == ("F32" if layer.always_real else "Q1_0")
        assert not layer.always_real or torch.equal(numbers, layer.weight.T)


def test_scales_that_float16_cuts_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    export_gguf(scaled(0.0), tmp_path / "zero.gguf", byte_level())
    assert "cuts digits" not in caplog.text
    export_gguf(scaled(3e-6), tmp_path / "small.gguf", byte_level())
    assert "up_proj" in caplog.text and "cuts digits" in caplog.text


def test_int8_tables_keep_their_numbers(tmp_path: Path) -> None:
    tokenizer = byte_level()
    model = pack_model(frozen(build("llama", tokenizer)), real="int8")
    path = export_gguf(model, tmp_path / "model.gguf", tokenizer)
    table = model.model.embed_tokens
    kind, numbers = tensors(path)["token_embd.weight"]
    assert kind == "Q8_0" and torch.equal(numbers, table.weight_step.half().float() * table.weight_int8)
    exact = export_gguf(model, tmp_path / "exact.gguf", tokenizer, real="float32")
    assert torch.equal(tensors(exact)["token_embd.weight"][1], table.weight)


@pytest.mark.parametrize(("width", "kind"), [(160, "Q4_0"), (72, "F16")])
def test_widths_that_128_does_not_divide(
    width: int, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = byte_level()
    size = {"hidden_size": width, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = frozen(build("qwen2", tokenizer, **size))
    found, place = tensors(export_gguf(model, tmp_path / "model.gguf", tokenizer)), names_of(model)
    for own, layer in binary_layers(model).items():
        expected = layer.binary_weight()
        fallen = expected.shape[1] % 128 != 0
        written, numbers = found[place(f"{own}.weight")]
        if not own.endswith("o_proj"):
            assert written == (kind if fallen else "Q1_0")
            assert not fallen or own in caplog.text
        assert torch.equal(numbers.sign(), expected.sign())
        assert torch.allclose(numbers, expected, rtol=1e-3)
    assert kind in caplog.text


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_blocks(data: st.DataObject) -> None:
    """float16(s) * sign(w), bit for bit, for one scale a row and for groups; Q4_0 and Q8_0 round s / 7 and s / 127."""
    kind = data.draw(st.sampled_from(list(BLOCKS)))
    rows, fan_in = data.draw(st.integers(1, 4)), BLOCKS[kind] * data.draw(st.integers(1, 4))
    group = BLOCKS[kind] * data.draw(st.integers(1, 5))
    group = data.draw(st.sampled_from([group, fan_in]))
    groups = -(-fan_in // group)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    w, scale = (torch.randn(rows, size, generator=generator) for size in (fan_in, groups))  # scales of either sign
    weight = BinaryWeight(pack_signs(w), scale, fan_in, group)
    assert weight.fits(kind)
    spread = scale.repeat_interleave(group, 1)[:, :fan_in]
    steps = {"Q1_0": 1, "Q4_0": 7, "Q8_0": 127}[kind]
    expected = (spread / steps).half().float() * (steps * torch.where(w >= 0, 1.0, -1.0))
    assert torch.equal(floats(weight.stored(kind), kind), expected)
    assert torch.equal(floats(weight.stored("F32"), "F32"), spread * torch.where(w >= 0, 1.0, -1.0))


@pytest.mark.parametrize(("group_size", "kind"), [(128, "Q1_0"), (256, "Q1_0"), (96, "Q4_0"), (40, "F16")])
def test_groups_of_scales(group_size: int, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A block has its group's scale, up to the last group, which may be smaller."""
    tokenizer = byte_level()
    plain = build("qwen2", tokenizer, hidden_size=384, intermediate_size=512)
    model = frozen(plain, weight_scale="group", group_size=group_size)
    for layer in binary_layers(model).values():
        layer.weight_scale.data.mul_(1 + torch.rand_like(layer.weight_scale))
    found, place = tensors(export_gguf(model, tmp_path / "model.gguf", tokenizer)), names_of(model)
    for own, layer in binary_layers(model).items():
        written, numbers = found[place(f"{own}.weight")]
        expected = layer.binary_weight()
        assert layer.weight_scale.shape[1] > 1 or layer.weight.shape[1] <= group_size
        assert written == kind or layer.weight_scale.shape[1] == 1
        assert torch.equal(numbers.sign(), expected.sign())
        assert torch.equal(numbers, expected.half().float()) or kind == "Q4_0"
        assert torch.allclose(numbers, expected, rtol=1e-3)
    assert (kind in caplog.text) == (kind != "Q1_0")


def test_a_block_never_spans_two_groups() -> None:
    weight = BinaryWeight(pack_signs(torch.randn(2, 384)), torch.rand(2, 4), 384, 96)
    assert not weight.fits("Q1_0") and weight.fits("Q4_0") and weight.fits("F16")


def test_binary_embeddings(tmp_path: Path) -> None:
    """A padding row of zeros stays one: its scale is zero."""
    tokenizer = word_pieces()
    model = frozen(build("bert", tokenizer), embeddings="binarize")
    kind, numbers = tensors(export_gguf(model, tmp_path / "model.gguf", tokenizer))["token_embd.weight"]
    expected = model.embeddings.word_embeddings.binary_weight()
    assert kind == "Q1_0" and torch.equal(numbers.sign(), expected.sign()) and not numbers[0].any()
    assert torch.allclose(numbers, expected, rtol=1e-3)


def test_binary_weights_in_other_types(tmp_path: Path) -> None:
    """As an older llama.cpp reads them."""
    tokenizer = byte_level()
    model = frozen(build("qwen3", tokenizer))
    for binary, kind in (("q8_0", "Q8_0"), ("float16", "F16"), ("float32", "F32")):
        path = export_gguf(model, tmp_path / f"{binary}.gguf", tokenizer, binary=binary)
        kinds = {found for name, (found, _) in tensors(path).items() if name.startswith("blk.") and "norm" not in name}
        assert kinds == {kind, "F32"} - ({"F32"} if kind != "F32" else set())


# ---- metadata and vocabulary ----


def test_metadata(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(byte_level("llama-bpe", adds_bos=True))
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    path = export_gguf(frozen(build("llama", tokenizer, vocab_size=520)), tmp_path / "new" / "m.gguf", tokenizer)
    expected = {
        "general.architecture": "llama", "general.file_type": 40, "llama.block_count": 2,
        "llama.embedding_length": WIDTH, "llama.attention.head_count_kv": 2, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False, "tokenizer.chat_template": "{{ messages }}",
    }  # fmt: skip
    assert {key: value(path, key) for key in expected} == expected
    tokens, types = value(path, "tokenizer.ggml.tokens"), value(path, "tokenizer.ggml.token_type")
    assert len(tokens) == len(types) == 520 and tokens[0] == "<s>" and types[:3] == [3, 3, 1]
    assert tokens[-1] == "[PAD519]" and types[-1] == 5
    assert value(path, "tokenizer.chat_template.tools") == "{{ tools }}"


def test_a_window_that_llama_cpp_has_not_bounds_the_context(tmp_path: Path) -> None:
    tokenizer = byte_level()
    path = export_gguf(frozen(build("mistral", tokenizer)), tmp_path / "model.gguf", tokenizer)
    assert value(path, "llama.context_length") == 48


def test_kinds_of_tokens(tmp_path: Path) -> None:
    tokenizer = sentence_pieces(prefix=True)
    path = export_gguf(frozen(build("llama", tokenizer)), tmp_path / "sp.gguf", tokenizer)
    tokens, types = value(path, "tokenizer.ggml.tokens"), value(path, "tokenizer.ggml.token_type")
    scores = dict(zip(tokens, value(path, "tokenizer.ggml.scores"), strict=True))
    assert types[tokens.index("<unk>")] == 2 and types[tokens.index("<s>")] == 3 and types[tokens.index("<0x0A>")] == 6
    assert scores["▁the"] < scores["th"] <= 0  # joined later
    tokenizer = word_pieces()
    path = export_gguf(frozen(build("bert", tokenizer)), tmp_path / "wp.gguf", tokenizer)
    tokens = value(path, "tokenizer.ggml.tokens")
    assert tokens[:4] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] and "▁the" in tokens and "e" in tokens
    assert value(path, "bert.attention.causal") is False and value(path, "bert.pooling_type") == 1


def test_merges_that_sentencepiece_would_not_make(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = json.loads(sentence_pieces(prefix=True).backend_tokenizer.to_str())
    assert "no merge joins" not in caplog.text
    spec["model"]["merges"] = spec["model"]["merges"][::2]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    export_gguf(frozen(build("llama", tokenizer)), tmp_path / "model.gguf", tokenizer)
    assert "no merge joins" in caplog.text


def test_added_tokens_that_a_space_would_be_put_in_front_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for prefix in (False, True):
        tokenizer = copy.deepcopy(sentence_pieces(prefix=prefix))
        tokenizer.add_tokens(["<tool>"])
        export_gguf(frozen(build("llama", tokenizer)), tmp_path / f"{prefix}.gguf", tokenizer)
        assert ("added tokens (<tool>)" in caplog.text) == prefix


def test_a_name_for_how_words_are_split(tmp_path: Path) -> None:
    spec = json.loads(byte_level().backend_tokenizer.to_str())
    spec["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False},
                          spec["pre_tokenizer"]],
    }  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), bos_token="<s>", eos_token="</s>"
    )
    model = frozen(build("llama", tokenizer))
    with pytest.raises(ExportError, match="pre='llama-bpe'"):
        export_gguf(model, tmp_path / "model.gguf", tokenizer)
    path = export_gguf(model, tmp_path / "model.gguf", tokenizer, pre="refact")
    assert value(path, "tokenizer.ggml.pre") == "refact"


# ---- what is refused ----


def llama(**options: Any) -> Any:
    return build("llama", byte_level(), **options)


def binarized(model: Any, **options: Any) -> Any:
    return binarize_model(model, StoMPPConfig(**options), example_inputs={"input_ids": torch.arange(8)[None]})


def classifier() -> Any:
    config = transformers.LlamaConfig(**{**gguf_models.DECODER, "vocab_size": 500})
    return frozen(transformers.LlamaForSequenceClassification(config))


def changed(model: Any, change: Callable[[Any], Any]) -> Any:
    change(model)
    return model


def scaled(number: float) -> Any:
    return changed(frozen(llama()), lambda model: model.model.layers[0].mlp.up_proj.weight_scale.data.fill_(number))


def latent_nan() -> Any:
    return changed(frozen(llama()), lambda model: model.model.layers[0].mlp.up_proj.weight.data[0, 0].fill_(torch.nan))


def tied() -> Any:
    model = frozen(llama())
    model.lm_head = model.model.layers[0].mlp.up_proj
    return model


def opt() -> Any:
    config = transformers.OPTConfig(
        vocab_size=500, hidden_size=64, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=64
    )
    return frozen(transformers.OPTForCausalLM(config))


def extra_parameter() -> Any:
    return changed(frozen(llama()), lambda model: model.model.register_parameter("extra", nn.Parameter(torch.zeros(3))))


def yarn() -> Any:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    return frozen(llama(rope_parameters=rope))


def lora() -> Any:
    return peft.get_peft_model(frozen(llama()), peft.LoraConfig(target_modules=["q_proj"], r=2))


FULL, SLIDING = "full_attention", "sliding_attention"
REFUSED: dict[str, tuple[Callable[[], Any], type[StoMPPError], str]] = {
    "not binarized": (llama, NotBinarizedError, "no binary layers"),
    "W1A1": (lambda: binarized(llama()), ExportError, "sign of its activations"),
    "stages not frozen": (lambda: binarized(llama(), binarize="weights"), ExportError, "commit=True"),
    "nothing binary": (lambda: binarized(llama(), binarize="nothing"), ExportError, "leaves every weight"),
    "unknown architecture": (opt, ExportError, "OPTForCausalLM is none of them"),
    "classifier": (classifier, ExportError, "a classifier's head"),
    "adapters": (lora, ExportError, "unload"),
    "tied weights": (tied, ExportError, "are tied"),
    "infinite scale": (lambda: scaled(float("inf")), NonFiniteError, "up_proj"),
    "scale beyond float16": (lambda: scaled(1e5), ExportError, "beyond float16"),
    "real value beyond float16": (
        lambda: changed(frozen(llama()), lambda model: model.lm_head.weight.data[0].fill_(1e6)), ExportError,
        "real='float32' takes it",
    ),
    "latent NaN": (latent_nan, NonFiniteError, "up_proj"),
    "yarn": (yarn, ExportError, "yarn"),
    "llama3's rope elsewhere": (
        lambda: frozen(build("qwen2", byte_level(), rope_parameters=gguf_models.LLAMA3)), ExportError, "llama3",
    ),
    "another activation": (lambda: frozen(llama(hidden_act="relu")), ExportError, "hidden_act='silu'"),
    "biases without a place": (
        lambda: frozen(build("qwen3", byte_level(), attention_bias=True)), ExportError, "attention_bias",
    ),
    "another pattern of windows": (
        lambda: frozen(build("gemma3", byte_level(), layer_types=[FULL, SLIDING, SLIDING])), ExportError, "layer_types",
    ),
    "a tensor without a place": (extra_parameter, ExportError, "no place for model.extra"),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason: str, tmp_path: Path) -> None:
    make, error, text = REFUSED[reason]
    with pytest.raises(error, match=text):
        export_gguf(make(), tmp_path / "model.gguf", byte_level())
    assert not list(tmp_path.iterdir())


def unigram() -> Any:
    made = Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], 0))
    return PreTrainedTokenizerFast(tokenizer_object=made)


def without_merges() -> Any:
    spec = json.loads(byte_level().backend_tokenizer.to_str())
    spec["model"]["merges"] = []
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), bos_token="<s>")


def spaced() -> Any:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (lambda: None, "AutoTokenizer"),
        (lambda: Path("nowhere"), "holds no tokenizer"),
        (unigram, "Unigram"),
        (spaced, "another kind"),
        (without_merges, "without a merge"),
        (lambda: sentence_pieces(prefix=True), "resize_token_embeddings"),
        (lambda: byte_level_with_eos_twice(), "can put bos_token"),
    ],
)
def test_refused_tokenizers(tokenizer: Callable[[], Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=text):
        export_gguf(frozen(llama(vocab_size=502)), tmp_path / "model.gguf", tokenizer())
    assert not list(tmp_path.iterdir())


def byte_level_with_eos_twice() -> Any:
    from tokenizers import processors

    made = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    made.post_processor = processors.TemplateProcessing(single="$A </s> </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def test_refused_options(tmp_path: Path) -> None:
    model, tokenizer = frozen(llama(vocab_size=800)), byte_level()
    (tmp_path / "there.gguf").write_text("mine")
    cases = [
        (tmp_path / "there.gguf", {}, "overwrite=True"),
        (tmp_path, {"overwrite": True}, "is a folder"),
        (tmp_path / "new.gguf", {"binary": "q2_0"}, "'q1_0' or"),
        (tmp_path / "new.gguf", {"real": "int8"}, "real is"),
        (tmp_path / "new.gguf", {"pooling": "cls"}, "embedding models"),
    ]
    for path, options, text in cases:
        with pytest.raises(ExportError, match=text):
            export_gguf(model, path, tokenizer, **options)
    with pytest.raises(ExportError, match="byte-level BPE"):
        export_gguf(model, tmp_path / "new.gguf", sentence_pieces(prefix=True), pre="qwen2")
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]
    assert (tmp_path / "there.gguf").read_text() == "mine"
    export_gguf(model, tmp_path / "there.gguf", tokenizer, overwrite=True)
    assert (tmp_path / "there.gguf").read_bytes()[:4] == b"GGUF"


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    (tmp_path / "model.gguf").write_text("mine")
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    with pytest.raises(OSError, match="disk full"):
        export_gguf(frozen(llama()), tmp_path / "model.gguf", byte_level(), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert (tmp_path / "model.gguf").read_text() == "mine"


def test_the_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else found(name, *rest))
    with pytest.raises(ExtraError, match=r"stompp-hf\[gguf\]"):
        export_gguf(frozen(llama()), tmp_path / "model.gguf", byte_level())


def test_gguf_is_imported_when_it_is_used() -> None:
    code = "import sys, stompp_hf; stompp_hf.export_gguf; assert 'gguf' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "export_gguf" in stompp_hf.__all__


# ---- the command line ----


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer, out = pack_model(frozen(llama())), byte_level(), tmp_path / "out.gguf"
    model.save_pretrained(tmp_path / "packed")
    assert main(["export-gguf", str(tmp_path / "packed"), str(out)]) == 1
    assert "holds no tokenizer" in capsys.readouterr().err and not out.exists()
    tokenizer.save_pretrained(tmp_path / "packed")
    assert main(["export-gguf", str(tmp_path / "packed"), str(out), "--real", "q8_0"]) == 0
    assert f"{out.stat().st_size:,} bytes" in capsys.readouterr().out
    assert main(["export-gguf", str(tmp_path / "packed"), str(out)]) == 1
    assert "overwrite" in capsys.readouterr().err
    direct = export_gguf(model, tmp_path / "direct.gguf", tokenizer, real="q8_0")
    mine, its = tensors(direct), tensors(out)
    assert mine.keys() == its.keys()
    assert all(mine[name][0] == its[name][0] and torch.equal(mine[name][1], its[name][1]) for name in mine)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_kind_of_tokenizer_is_taken(name: str, tmp_path: Path) -> None:
    """From its folder, too."""
    tokenizer = TOKENIZERS[name]()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model = frozen(build("llama", tokenizer))
    one = export_gguf(model, tmp_path / "one.gguf", tokenizer)
    two = export_gguf(model, tmp_path / "two.gguf", tmp_path / "tokenizer")
    assert one.read_bytes() == two.read_bytes()

"""Tiny models of each architecture that export_gguf knows, and tokenizers of each kind, trained on the spot."""

import functools
import json
import random
from collections.abc import Callable
from pydoc_data import topics
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from stompp_hf import Progression, StoMPPConfig, binarize_model

WIDTH = 128
TEXT = "\n".join(topics.topics[name] for name in ("assert", "class", "exceptions", "lambda", "numbers", "strings"))
NUMBERS = " ".join(str(37 * i) for i in range(3000))
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}
DECODER = {
    "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64, "initializer_range": 0.08,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
BERT = {
    "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.08, "hidden_act": "gelu",
}  # fmt: skip
GPT2 = {
    "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.08, "bos_token_id": 0,
    "eos_token_id": 1,
}  # fmt: skip
GEMMA3 = {
    "num_hidden_layers": 3, "sliding_window": 8, "query_pre_attn_scalar": 32,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {**LINEAR, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    },
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", DECODER),
    "llama, biases and llama3's rope": (
        "LlamaForCausalLM",
        {**DECODER, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    ),
    "llama, tied, wider heads": (
        "LlamaForCausalLM",
        {**DECODER, "tie_word_embeddings": True, "head_dim": 64, "rope_parameters": LINEAR},
    ),
    "mistral": ("MistralForCausalLM", {**DECODER, "sliding_window": 48}),
    "qwen2": ("Qwen2ForCausalLM", {**DECODER, "rope_parameters": LINEAR}),
    "qwen3": ("Qwen3ForCausalLM", {**DECODER, "head_dim": 64}),
    "gemma": ("GemmaForCausalLM", {**DECODER, "tie_word_embeddings": True, "head_dim": 64}),
    "gemma3": ("Gemma3ForCausalLM", {**DECODER, **GEMMA3}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "bert": ("BertModel", BERT),
}


def build(name: str, tokenizer: Any, **options: Any) -> Any:
    """A model of a case, in full precision; norms and biases are drawn too, so that none can be forgotten."""
    cls, fields = CASES[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, cls)
    model = model_class(model_class.config_class(**{**fields, "vocab_size": len(tokenizer), **options}))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def frozen(model: Any, **options: Any) -> Any:
    """The same with binary weights and every stage frozen."""
    model = binarize_model(model, StoMPPConfig(binarize="weights", refresh_rate=1, **options))
    Progression(model, total_steps=2).step(2)
    return model.eval()


# ---- tokenizers ----

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_ISOLATED = {"behavior": "isolated"}
_BYTES = functools.partial(pre_tokenizers.ByteLevel, add_prefix_space=False)
SPLITS: dict[str, Callable[[], Any]] = {
    "gpt-2": _BYTES,
    "llama-bpe": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_LLAMA3), **_ISOLATED), _BYTES(use_regex=False)]
    ),
    "qwen2": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_LLAMA3.replace("{1,3}", "")), **_ISOLATED), _BYTES(use_regex=False)]
    ),
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTES()]),
}


@functools.cache
def byte_level(split: str = "gpt-2", *, ascii_only: bool = False, adds_bos: bool = False) -> Any:
    """Byte-level BPE; every token is whole characters if it knows ASCII alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = SPLITS[split](), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=[] if ascii_only else pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT.encode("ascii", "ignore").decode(), NUMBERS], trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@functools.cache
def sentence_pieces(*, prefix: bool) -> Any:
    """BPE as Llama 2 (which puts a space in front) and Gemma have it: all ways to join a token are merges."""
    space = [normalizers.Prepend("▁")] if prefix else []
    normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    first = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizer
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no token spans two words
    learner.train_from_iterator(
        TEXT.splitlines(), trainers.BpeTrainer(vocab_size=800, special_tokens=first, show_progress=False)
    )
    vocabulary = learner.get_vocab()
    merges = []
    for token in sorted(set(vocabulary) - set(first), key=lambda token: vocabulary[token]):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [pair for pair in pairs if all(half in vocabulary for half in pair)]
        merges += sorted(pairs, key=lambda pair: [vocabulary[half] for half in pair])
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@functools.cache
def word_pieces(*, lowercase: bool = True) -> Any:
    """WordPiece as BERT has it."""
    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=list(special.values()), show_progress=False)
    tokenizer.train_from_iterator([*TEXT.splitlines(), "ÀÉÖñç äöü 你好 0123456789"], trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in special.items()}
    )


def of_class(cls: str, base: Callable[[], Any]) -> Any:
    """A tokenizer of a class of transformers, which splits and normalizes as that class does."""
    model = json.loads(base().backend_tokenizer.to_str())["model"]
    merges = {"merges": [tuple(pair) for pair in model["merges"]]} if "merges" in model else {}
    return getattr(transformers, cls)(vocab=model["vocab"], **merges)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    **{f"byte-level, {split}": functools.partial(byte_level, split) for split in SPLITS},
    "byte-level, with bos": functools.partial(byte_level, adds_bos=True),
    "SentencePiece, as Llama 2": functools.partial(sentence_pieces, prefix=True),
    "SentencePiece, as Gemma": functools.partial(sentence_pieces, prefix=False),
    "LlamaTokenizer": functools.partial(of_class, "LlamaTokenizer", functools.partial(sentence_pieces, prefix=True)),
    "GemmaTokenizer": functools.partial(of_class, "GemmaTokenizer", functools.partial(sentence_pieces, prefix=False)),
    "Qwen2Tokenizer": functools.partial(of_class, "Qwen2Tokenizer", functools.partial(byte_level, "qwen2")),
    "GPT2Tokenizer": functools.partial(of_class, "GPT2Tokenizer", byte_level),
    "BertTokenizer": functools.partial(of_class, "BertTokenizer", word_pieces),
    "WordPiece": word_pieces,
    "WordPiece, cased": functools.partial(word_pieces, lowercase=False),
}


def strings(count: int) -> list[str]:
    """Words, numbers, white space, punctuation and other scripts, in any order."""
    draw = random.Random(0)
    words = TEXT.split()
    others = [
        "naïve",
        "Ünïcødé",
        "你好",
        "日本語",
        "привет",
        "🙂",
        "€5",
        "don't",
        "I'LL",
        "x=1;",
        "...",
        "->",
        "12345",
        "3.14",
    ]
    gaps = [" ", " ", " ", "", "  ", "\n", "\n\n", "\t", "   "]
    return [
        "".join(draw.choice(words if draw.random() < 0.7 else others) + draw.choice(gaps) for _ in range(1 + i % 12))
        for i in range(count)
    ]

"""A tokenizer as llama.cpp's vocabulary: byte-level BPE, BPE in the manner of SentencePiece, and WordPiece.

Everything is read from tokenizer.json's content, or asked of the tokenizer: what it puts around a text, say.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

from ..errors import ExportError
from .gguf_architectures import Fields

logger = logging.getLogger(__name__)

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What ByteLevel splits by, if nothing else does."""
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE = {
    (GPT2,): "gpt-2",
    (_WORDS % "{1,3}",): "llama-bpe",
    (_WORDS % "",): "qwen2",
    ("Digits", GPT2): "smollm",
}
"""llama.cpp's name of what splits a text into words, by the patterns that do it, one after the other."""
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
SPECIAL = ("bos_token_id", "eos_token_id", "unk_token_id", "sep_token_id", "pad_token_id", "mask_token_id")


def load_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer of transformers with a tokenizer.json, from itself or from its folder.

    Raises:
        ExportError: it is none, or the folder has none.
    """
    if isinstance(tokenizer, str | os.PathLike):
        from transformers import AutoTokenizer

        folder = Path(tokenizer)
        if not any((folder / name).is_file() for name in FILES):
            raise ExportError(
                f"export_gguf: {folder} holds no tokenizer, and llama.cpp reads text. Save it there with "
                "tokenizer.save_pretrained(folder), or give the folder that has it (on the command line: --tokenizer)."
            )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ExportError(
            f"export_gguf needs the model's tokenizer, since llama.cpp reads text, and {tokenizer!r} is not one with a "
            "tokenizer.json: export_gguf(model, path, AutoTokenizer.from_pretrained(folder))."
        )
    return tokenizer


def vocabulary(tokenizer: Any, rows: int, pre: str | None) -> Fields:
    """Metadata of a vocabulary, by the method of GGUFWriter that writes it, without its add_.

    Args:
        tokenizer: from `load_tokenizer`.
        rows: of the model's table; those without a token become unused ones.
        pre: what `PRE` would be asked for.

    Raises:
        ExportError: llama.cpp has no such tokenizer, or it has more tokens than the table has rows.
    """
    spec: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = spec["model"], {token["id"]: token for token in spec["added_tokens"]}
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    if (count := max(names, default=-1) + 1) > rows:
        raise ExportError(
            f"export_gguf: the tokenizer has {count} tokens, and the model's table {rows} rows: they do not "
            "belong together, or model.resize_token_embeddings(len(tokenizer)) was left out before binarize_model."
        )
    if model["type"] == "WordPiece":
        kind = _word_pieces(spec)
    elif model["type"] == "BPE" and model.get("byte_fallback"):
        kind = _sentence_pieces(spec, rows, names)
    elif model["type"] == "BPE" and (patterns := _patterns(spec)):
        kind = _byte_level(model, patterns, pre)
    else:
        raise ExportError(
            f"export_gguf writes byte-level BPE, BPE with byte_fallback (as Llama 2 and Gemma have it) and WordPiece, "
            f"and this tokenizer is a {model['type']} of another kind."
        )
    if pre is not None and kind["tokenizer_model"] != "gpt2":
        raise ExportError(
            f"export_gguf: pre={pre!r} is for byte-level BPE; leave it out for a {model['type']} like this."
        )
    tokens, types = [], []
    for number in range(rows):
        name, own = names.get(number), added.get(number)
        if name is None:
            token, role = f"[PAD{number}]", UNUSED
        elif own is not None:
            token, role = name, CONTROL if own["special"] else USER_DEFINED
        elif kind["tokenizer_model"] == "llama" and len(name) == 6 and name.startswith("<0x"):
            token, role = name, BYTE
        else:
            token, role = name, NORMAL
        if number == tokenizer.unk_token_id and kind["tokenizer_model"] != "gpt2":
            role = UNKNOWN
        tokens.append(_spelled(token, role, kind["tokenizer_model"]))
        types.append(role)
    return {**kind, "token_list": tokens, "token_types": types, **_special(tokenizer, kind["tokenizer_model"])}


def _spelled(token: str, role: int, model: str) -> str:
    """A token as llama.cpp wants it written."""
    if model == "bert" and role == NORMAL:
        return token.removeprefix("##") if token.startswith("##") else SPACE + token
    return token.replace(SPACE, " ") if model == "llama" and role == USER_DEFINED else token


# ---- kinds ----


def _patterns(spec: dict[str, Any]) -> tuple[str, ...]:
    """What a byte-level tokenizer splits by; empty where it is not of that kind."""
    steps = spec["pre_tokenizer"] or {}
    found: list[str] = []
    for step in steps.get("pretokenizers", [steps]):
        if step.get("type") == "ByteLevel" and not step["add_prefix_space"]:
            return (*found, GPT2) if step["use_regex"] else tuple(found)
        pattern = step.get("pattern", {}).get("Regex", step.get("type", "nothing"))
        found.append(f"{pattern}{'' if step.get('behavior', 'Isolated') == 'Isolated' else step['behavior']}")
    return ()


def _byte_level(model: dict[str, Any], patterns: tuple[str, ...], pre: str | None) -> Fields:
    if pre is None and patterns not in PRE:
        raise ExportError(
            f"export_gguf: llama.cpp has a name for how a text is split into words (tokenizer.ggml.pre), and none is "
            f"known here for {' then '.join(patterns)}. Name it, as in pre='llama-bpe', and compare tokens; known are "
            f"{', '.join(PRE.values())}."
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not merges:
        raise ExportError("export_gguf: the tokenizer joins no bytes, and llama.cpp loads no BPE without a merge.")
    return {"tokenizer_model": "gpt2", "tokenizer_pre": pre or PRE[patterns], "token_merges": merges}


def _sentence_pieces(spec: dict[str, Any], rows: int, names: dict[int, str]) -> Fields:
    """llama.cpp joins what gives the token of the best score, and BPE what was merged first: a score is its rank."""
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in spec["model"]["merges"]]
    rank: dict[str, int] = {}
    for place, (left, right) in enumerate(merges):
        rank.setdefault(left + right, place)
    pairs, vocabulary = {(left, right) for left, right in merges}, spec["model"]["vocab"]
    halves = [(word, word[:i], word[i:]) for word in rank for i in range(1, len(word))]
    extra = {word for word, *pair in halves if all(h in vocabulary for h in pair) and tuple(pair) not in pairs}
    if extra:
        logger.warning(
            "export_gguf: %d of %d tokens can be joined from parts that no merge joins, such as %r. llama.cpp will do "
            "so, as SentencePiece does, and may give other tokens than this tokenizer. Compare some texts.",
            *(len(extra), len(rank), min(extra)),
        )
    steps = spec["pre_tokenizer"] or {}
    steps = [*steps.get("pretokenizers", [steps]), *_normalizers(spec)]
    prefix = any(step.get("type") == "Prepend" or step.get("prepend_scheme", "never") != "never" for step in steps)
    spaced = [token["content"] for token in spec["added_tokens"] if token["normalized"] and not token["special"]]
    if prefix and spaced:
        logger.warning(
            "export_gguf: this tokenizer puts a space in front of added tokens (%s), too, and llama.cpp does not: they "
            "are split differently where they stand in a text. Add them as special ones.",
            ", ".join(spaced),
        )
    return {
        "tokenizer_model": "llama",
        "tokenizer_pre": "default",
        "token_scores": [float(-rank.get(names.get(number, ""), len(merges))) for number in range(rows)],
        "add_space_prefix": prefix,
    }


def _word_pieces(spec: dict[str, Any]) -> Fields:
    rules = next((step for step in _normalizers(spec) if step.get("type") == "BertNormalizer"), None)
    kind = (spec["pre_tokenizer"] or {}).get("type")
    if rules is None or kind != "BertPreTokenizer" or spec["model"]["continuing_subword_prefix"] != "##":
        raise ExportError(
            "export_gguf: llama.cpp's WordPiece is BERT's, with BertNormalizer, BertPreTokenizer and the prefix '##', "
            f"and this one has {kind} and {spec['model']['continuing_subword_prefix']!r}."
        )
    lowercase, accents = rules["lowercase"], rules["strip_accents"]
    return {
        "tokenizer_model": "bert",
        "tokenizer_pre": "default",
        "tokenizer.ggml.normalizer.lowercase": lowercase,
        "tokenizer.ggml.normalizer.strip_accents": lowercase if accents is None else accents,
    }


def _normalizers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    steps = spec["normalizer"] or {}
    return steps.get("normalizers", [steps])


# ---- special tokens ----


def _special(tokenizer: Any, model: str) -> Fields:
    fields = {name: getattr(tokenizer, name, None) for name in SPECIAL}
    if model == "bert":  # puts its first and last around every text
        fields |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    else:
        fields |= _around(tokenizer, fields["bos_token_id"], fields["eos_token_id"])
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    return {name: value for name, value in {**fields, "chat_template": template}.items() if value is not None}


def _around(tokenizer: Any, first: int | None, last: int | None) -> Fields:
    """Which of its special tokens it puts around a text."""
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for before in (False, True):
        for after in (False, True):
            if whole == [*[first] * before, *inner, *[last] * after]:
                return {"add_bos_token": before, "add_eos_token": after}
    raise ExportError(
        f"export_gguf: the tokenizer makes {whole} of 'a', and llama.cpp can put bos_token ({first}) and eos_token "
        f"({last}) around {inner} alone."
    )

"""What llama.cpp knows of an architecture: one row a model type, ARCHITECTURES. A further one joins with a row.

Names of tensors come from the package gguf. A row adds what has no name there: the metadata that llama.cpp asks for,
what it takes for granted of a config, and in what form it wants tensors.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import ExportError

Fields = dict[str, Any]
"""Metadata by the method of GGUFWriter that writes it, without its add_."""
NONE = (None, False)
GELU = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")
"""All one to llama.cpp, which computes the tanh form from a table in float16."""


@dataclass(frozen=True)
class Architecture:
    """A row.

    name: llama.cpp's; model_class: the only class of transformers that computes what llama.cpp would.
    fields: metadata from a config; takes: the values of config fields that llama.cpp takes for granted.
    paired: projections, by the config field that counts their heads, whose rows llama.cpp rotates as neighbours, and
    transformers half a head apart; tensors: ones that no model of transformers holds, from a config.
    norm_offset: what is added to a norm's weight; left_out: beginnings of names that it has no use for.
    embeds: whether it gives an embedding of a text, pooled, in place of the next token.
    """

    name: str
    model_class: str
    fields: Callable[[Any], Fields]
    takes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    paired: Mapping[str, str] = field(default_factory=dict)
    tensors: Callable[[Any], dict[str, Tensor]] = lambda config: {}
    norm_offset: float = 0.0
    left_out: tuple[str, ...] = ()
    embeds: bool = False

    def row_order(self, name: str, rows: int, config: Any) -> Tensor | None:
        """The order in which llama.cpp wants the rows of a projection, or None if as they are."""
        heads = next((heads for projection, heads in self.paired.items() if f".{projection}." in name), None)
        return None if heads is None else paired_rows(rows, getattr(config, heads))


def paired_rows(rows: int, heads: int) -> Tensor:
    """Rows i and i + d / 2 of each head of size d, one after the other."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def architecture_of(model: Any) -> Architecture:
    """The row of a model.

    Raises:
        ExportError: there is none, the model is of another class, or its config asks for what llama.cpp does not do.
    """
    config: Any = getattr(model, "config", None)
    found = ARCHITECTURES.get(getattr(config, "model_type", ""))
    if found is None:
        raise ExportError(
            f"export_gguf knows {', '.join(ARCHITECTURES)}, and {type(model).__name__} is none of them. A row in "
            "stompp_hf/export/gguf_architectures.py adds one; stompp_hf.export_onnx(model, path) takes any."
        )
    if all(cls.__name__ != found.model_class for cls in type(model).__mro__):
        raise ExportError(
            f"export_gguf: of {config.model_type}, llama.cpp runs {found.model_class}, and this is a "
            f"{type(model).__name__}. Export the {found.model_class} itself, without wrappers, and without a "
            "classifier's head, which has no place in the file (of a BertFor... class: model.bert)."
        )
    for option, values in found.takes.items():
        refuse_unless(config, option, values)
    return found


def refuse_unless(config: Any, option: str, values: tuple[Any, ...]) -> None:
    """Refuse a config that asks for what llama.cpp does not compute."""
    if (value := getattr(config, option, values[0])) not in values:
        raise ExportError(
            f"export_gguf: llama.cpp computes {config.model_type} with {option}={' or '.join(map(repr, values))}, and "
            f"this model has {value!r}: the file would say other things. stompp_hf.export_onnx(model, path) keeps it."
        )


# ---- metadata ----


def _sizes(config: Any) -> Fields:
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
    }


def _decoder(config: Any, ropes: tuple[str, ...] = ("default", "linear")) -> Fields:
    size = head_size(config)
    return {
        **_sizes(config),
        "head_count_kv": config.num_key_value_heads,
        "key_length": size,
        "value_length": size,
        "rope_dimension_count": size,
        "layer_norm_rms_eps": config.rms_norm_eps,
        **_rope(config, config.rope_parameters.get("full_attention", config.rope_parameters), ropes),
    }


def head_size(config: Any) -> int:
    """Of attention."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope(config: Any, rope: Mapping[str, Any], kinds: tuple[str, ...]) -> Fields:
    kind, share = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    if kind not in kinds or share != 1.0:
        raise ExportError(
            f"export_gguf: of {config.model_type}, positions are written of rope_type {' or '.join(map(repr, kinds))}, "
            f"over whole heads, and not of {kind!r} over {share:.0%} of them. stompp_hf.export_onnx(model, path) keeps "
            "them."
        )
    fields = {"rope_freq_base": rope["rope_theta"]}
    if kind == "linear":
        from gguf import RopeScalingType

        fields |= {"rope_scaling_type": RopeScalingType.LINEAR, "rope_scaling_factor": rope["factor"]}
    return fields


def _llama(config: Any) -> Fields:
    fields, window = _decoder(config, ("default", "linear", "llama3")), getattr(config, "sliding_window", None)
    if window is not None:  # Mistral's. llama.cpp has none here, and is right for as many tokens as the window has
        fields["context_length"] = min(fields["context_length"], window)
    return fields


def _gemma3(config: Any) -> Fields:
    refuse_unless(config, "query_pre_attn_scalar", (head_size(config),))
    kinds, full = config.layer_types, "full_attention"
    every = kinds.index(full) + 1 if full in kinds else len(kinds) + 1
    expected = [full if i % every == 0 else "sliding_attention" for i in range(1, len(kinds) + 1)]
    refuse_unless(config, "layer_types", (expected,))
    local = _rope(config, config.rope_parameters["sliding_attention"], ("default",))
    return {
        **_decoder(config),
        "sliding_window": config.sliding_window,
        "sliding_window_pattern": every,
        "rope_freq_base_swa": local["rope_freq_base"],
    }


def _gpt2(config: Any) -> Fields:
    return {
        "block_count": config.n_layer,
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "head_count": config.n_head,
        "layer_norm_eps": config.layer_norm_epsilon,
    }


def _bert(config: Any) -> Fields:
    return {
        **_sizes(config),
        "layer_norm_eps": config.layer_norm_eps,
        "token_type_count": config.type_vocab_size,
        "causal_attention": False,
    }


# ---- tensors ----


def _llama3_factors(config: Any) -> dict[str, Tensor]:
    """By what llama.cpp divides each frequency: 1 for short waves, `factor` for long ones, between them in between."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return {}
    size, factor, whole = head_size(config), rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    waves = whole * rope["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size) / (2 * math.pi)
    smooth = ((waves - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": 1 / ((1 - smooth) / factor + smooth)}


_SILU = {"hidden_act": ("silu",)}
_PAIRED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
_GEMMA = {"attention_bias": NONE, "use_bidirectional_attention": NONE}
ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", _llama, _SILU, _PAIRED, _llama3_factors),
    "mistral": Architecture("llama", "MistralForCausalLM", _llama, _SILU, _PAIRED, _llama3_factors),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _decoder, {**_SILU, "use_sliding_window": NONE}),
    "qwen3": Architecture(
        "qwen3", "Qwen3ForCausalLM", _decoder, {**_SILU, "use_sliding_window": NONE, "attention_bias": NONE}
    ),
    "gemma": Architecture(
        "gemma",
        "GemmaForCausalLM",
        _decoder,
        {**_GEMMA, "hidden_act": GELU[1:], "tie_word_embeddings": (True,)},
        norm_offset=1.0,
    ),
    "gemma3_text": Architecture(
        "gemma3",
        "Gemma3ForCausalLM",
        _gemma3,
        {
            **_GEMMA,
            "hidden_activation": GELU[1:],
            "attn_logit_softcapping": NONE,
            "final_logit_softcapping": NONE,
        },
        norm_offset=1.0,
    ),
    "gpt2": Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        _gpt2,
        {
            "activation_function": GELU,
            "add_cross_attention": NONE,
            "scale_attn_by_inverse_layer_idx": NONE,
            "scale_attn_weights": (True,),
        },
    ),
    "bert": Architecture(
        "bert",
        "BertModel",
        _bert,
        {"hidden_act": GELU, "is_decoder": NONE, "add_cross_attention": NONE},
        left_out=("pooler.",),
        embeds=True,
    ),
}
"""By model_type of a config."""

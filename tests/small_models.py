"""Small models of any of transformers' types, built from their own default configs, and inputs that they accept.

Nothing here knows an architecture. A config's numbers are made small by their names; where the result does not build
or does not run, the next recipe changes less. A model without a way is left out by whoever asks.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from stompp_hf.surgery.running import example_inputs_of

LARGEST = 70_000_000
"""Parameters of the largest model that counts as small."""

WIDTH, FEED, HEADS, LAYERS, WORDS = 64, 96, 4, 2, 512

# What a script trains comes first: then the head, its ties and its exclusion are part of what is judged.
TASKS = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_CLASSIFICATION", "CTC", "SPEECH_SEQ_2_SEQ",
    "IMAGE_TEXT_TO_TEXT", "SEQUENCE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION",
    "OBJECT_DETECTION", "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "TIME_SERIES_PREDICTION", "PRETRAINING",
)  # fmt: skip

_NAMES: dict[int, set[str]] = {
    WIDTH: {
        "hidden_size", "d_model", "dim", "n_embd", "embed_dim", "embedding_size", "hidden_dim", "out_hidden_size",
        "projection_dim", "encoder_hidden_size", "decoder_hidden_size", "text_hidden_size", "emb_dim",
        "encoder_hidden_dim", "decoder_hidden_dim", "word_embed_proj_dim", "embedding_dim", "projector_hidden_size",
        "fpn_hidden_size", "mask_downsampler_embed_dim", "pooler_hidden_size", "lstm_hidden_size",
        "projection_size", "hidden_size_per_layer_input", "encoder_embed_dim", "decoder_embed_dim",
        "output_hidden_size",
        "classifier_proj_size", "xvector_output_dim", "shared_projection_dim", "lru_width", "fusion_hidden_size",
        "memory_attention_hidden_size", "backbone_hidden_size", "audio_hidden_size", "output_dim", "pooler_output_size",
    },
    FEED: {
        "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "mlp_dim", "ffn_hidden_size",
        "moe_intermediate_size", "shared_expert_intermediate_size", "n_inner", "dim_feedforward", "d_inner",
        "shared_intermediate_size", "intermediate_size_mlp", "dense_intermediate_size", "adapter_out_dim",
        "moe_shared_expert_intermediate_size", "iou_head_hidden_dim", "encoder_intermediate_size",
    },
    LAYERS: {
        "num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "n_layer", "n_layers", "depth", "layers",
        "num_decoder_layers", "num_encoder_layers", "num_blocks", "encoder_num_layers", "decoder_num_layers",
        "encoder_num_hidden_layers", "decoder_num_hidden_layers", "num_nextn_predict_layers", "resampler_depth",
        "memory_attention_num_layers", "num_mem_blocks", "l_layers", "x_layers", "r_layers", "n_encoder_layers",
        "num_key_value_heads", "swa_num_key_value_heads", "linear_num_key_heads", "pred_num_hidden_layers",
        "num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts", "num_kv_heads", "n_head_kv",
        "max_window_layers",
    },
    HEADS: {
        "num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads", "decoder_attention_heads",
        "attention_heads", "encoder_num_attention_heads", "decoder_num_attention_heads", "linear_num_value_heads",
        "swa_num_attention_heads", "index_n_heads", "pred_num_attention_heads", "num_experts", "n_routed_experts",
        "num_local_experts", "moe_num_experts", "resampler_n_heads", "num_register_tokens", "index_topk",
    },
    16: {
        "head_dim", "kv_lora_rank", "q_lora_rank", "v_head_dim", "index_head_dim", "linear_key_head_dim", "d_kv",
        "linear_value_head_dim", "swa_head_dim", "global_head_dim", "resampler_head_dim", "dim_head", "qk_head_dim",
        "mamba_d_head", "mamba_d_state", "mamba_head_dim", "ssm_state_size", "attention_head_size",
        "mamba_chunk_size", "chunk_size",
    },
    8: {"qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"},
    1: {"n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "num_shared_experts"},
    WORDS: {"vocab_size", "vocab_size_per_layer_input", "text_vocab_size", "speech_vocab_size", "audio_vocab_size"},
    128: {"max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions", "max_seq_len"},
}  # fmt: skip
_SMALL = {name: value for value, names in _NAMES.items() for name in names}
_WIDE = {name: LAYERS if value == HEADS and "head" in name else value for name, value in _SMALL.items()}
_WIDE = {**{name: value for name, value in _WIDE.items() if value not in (8, 16)}, **dict.fromkeys(_NAMES[WIDTH], 256)}
"""What leaves the heads' sizes as they are: rotary embeddings may be cut into sections that sum to one."""
_COUNTS = {name: LAYERS for name in _NAMES[LAYERS] if "layer" in name or name in ("depth", "num_blocks")}
_SAFE = {**_COUNTS, **dict.fromkeys(_NAMES[WORDS], WORDS)}
"""What leaves every width as it is."""


_GIVEN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 640},
    "align_vision_model": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 640},
    "esm": {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
}
"""What a default config leaves open, or lays out over more layers than a small model has."""


def _shrink(name: str, value: Any, table: dict[str, int], config: PreTrainedConfig) -> Any:
    """The small value of one entry of a config, or the same one."""
    widths = table in (_SMALL, _WIDE)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        if name == "image_size":
            return 32 if widths and hasattr(config, "patch_size") else 64
        if name == "patch_size":
            return 8 if widths and value > 8 else value
        if name == "head_dim" and hasattr(config, "qk_rope_head_dim"):
            name = "qk_rope_head_dim"  # there it is that part of a head that turns
        return min(value, table[name]) if name in table else value
    if isinstance(value, (list, tuple)) and value and all(type(entry) is int for entry in value):
        kind = type(value)
        if name == "image_size":
            return kind([64] * len(value))
        if name == "depths" or name.endswith("num_blocks"):
            return kind([min(entry, 1) for entry in value])
        if widths and (name.endswith(("hidden_sizes", "embed_dims")) or name in ("embed_dim", "conv_dim")):
            return kind([max(8, entry // 8) for entry in value])
    return value


def _layer_lists(config: PreTrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """Lists with an entry a layer: the first layer of each kind, and as many layers as there are kinds."""
    count = getattr(config, "num_hidden_layers", None)
    lists = {k: v for k, v in vars(config).items() if isinstance(v, (list, tuple)) and len(v) == count and count > 2}
    named = [v for v in lists.values() if isinstance(v[0], str)]
    if not named:
        return {k: v[: values.get("num_hidden_layers", count)] for k, v in lists.items()}
    seen: dict[tuple[str, ...], int] = {}
    for index, kinds in enumerate(zip(*named, strict=True)):
        seen.setdefault(kinds, index)
    kept = sorted(seen.values()) if len(seen) > 1 else [0, 1]
    return {**{k: type(v)(v[i] for i in kept) for k, v in lists.items()}, "num_hidden_layers": len(kept)}


def _overrides(config: PreTrainedConfig, table: dict[str, int]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        small = _overrides(value, table) if isinstance(value, PreTrainedConfig) else _shrink(name, value, table, config)
        if small != value:
            values[name] = small
    if "num_hidden_layers" in values:
        values |= _layer_lists(config, values)
    values |= _GIVEN.get(config.model_type, {})
    rope = values.get("rope_parameters", getattr(config, "rope_parameters", None))
    if "head_dim" in values and isinstance(rope, dict) and "mrope_section" in rope:
        values["rope_parameters"] = {**rope, "mrope_section": [2, 3, 3]}
    return values


def _fit_tokens(config: PreTrainedConfig, words: int) -> None:
    """Special tokens lie in the vocabulary, each at a place of its own."""
    for index, (name, value) in enumerate(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _fit_tokens(value, getattr(value, "vocab_size", None) or words)
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= words:
            setattr(config, name, words - 1 - index % (words // 2))


def small_configs(model_type: str) -> Iterator[PreTrainedConfig]:
    """Configs of this type from small to as it is: all made small, layers and words only, and the default."""
    cls = CONFIG_MAPPING[model_type]
    for table in (_SMALL, _WIDE, _SAFE, {}):
        try:
            config = cls(**_overrides(cls(), table)) if table else cls()
            words = getattr(config.get_text_config(), "vocab_size", None)
            _fit_tokens(config, words if isinstance(words, int) and words > 1 else WORDS)
        except Exception:  # whatever a config says to numbers that do not fit each other
            continue
        yield config


def model_classes(model_type: str) -> list[type[PreTrainedModel]]:
    """The classes of this type: of a task that is trained, then the bare one, then whatever takes the config."""
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING", None) for task in TASKS]
    config_class = CONFIG_MAPPING[model_type]
    found: list[type[PreTrainedModel]] = []
    for mapping in (*mappings, modeling_auto.MODEL_MAPPING):
        try:
            cls = mapping[config_class]
        except (KeyError, TypeError, ImportError, AttributeError, ValueError):
            continue
        found += cls if isinstance(cls, tuple) else [cls]
    module = importlib.import_module(config_class.__module__.replace("configuration_", "modeling_"))
    found += [
        cls for _, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, PreTrainedModel) and not cls.__name__.endswith("PreTrainedModel")
    ]  # fmt: skip
    return [cls for cls in dict.fromkeys(found) if getattr(cls, "config_class", None) is config_class]


def parameters_of(cls: type[PreTrainedModel], config: PreTrainedConfig) -> int:
    """How many parameters the model would have; it is built without memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in cls._from_config(config).parameters())


# ---- inputs ----


def _number(config: Any, *names: str, default: int) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        if isinstance(value, (list, tuple)) and value and isinstance(value[-1], int):
            return value[-1]
    return default


def made_inputs(model: PreTrainedModel, layout: int, seed: int) -> dict[str, Any]:
    """Inputs by the names that forward takes; `layout` chooses where names say too little (time before bins, video)."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    text = config.get_text_config()
    vision, audio = (getattr(config, name, None) or config for name in ("vision_config", "audio_config"))
    batch, length = 2, 16
    width = _number(text, "hidden_size", "d_model", "dim", default=WIDTH)
    size = _number(vision, "image_size", "input_size", default=64)
    channels = _number(vision, "num_channels", "in_channels", "in_chans", default=3)
    bins = _number(audio, "num_mel_bins", "feature_size", "input_size", "input_dim", "n_mels", default=80)
    frames = 2 * _number(audio, "max_source_positions", default=50)
    context = _number(config, "context_length", "seq_length", default=32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def tokens() -> Tensor:
        words = _number(text, "vocab_size", "num_embeddings", "codebook_size", default=50)
        ids = torch.randint(3, max(4, words // 2), (batch, length), generator=generator)
        end = getattr(text, "eos_token_id", None)
        if isinstance(end, int):
            ids[:, -1] = end
        return ids

    clip = _number(config, "num_frames", "frames_per_clip", "tubelet_size", default=2)
    image = [(batch, channels, size, size), (batch, clip, channels, size, size), (batch, 1, size, size)]
    sound = [(batch, bins, frames), (batch, frames, bins), (batch, 1, frames, bins)]
    if isinstance(getattr(config, "max_length", None), int) and hasattr(config, "num_mel_bins"):
        sound = [(batch, config.max_length, bins)] * 3  # of a spectrogram transformer
    wave = sound if getattr(config, "num_mel_bins", None) else [(batch, 4000), (batch, 1, 4000), (batch, 2, 4000)]
    ways: dict[str, Callable[[], Any]] = {
        "input_ids": tokens,
        "attention_mask": lambda: torch.ones(batch, length, dtype=torch.long),
        "decoder_input_ids": tokens,
        "pixel_values": lambda: normal(*image[layout]),
        "pixel_values_videos": lambda: normal(batch, clip, channels, size, size),
        "input_features": lambda: normal(*sound[layout]),
        "input_values": lambda: normal(*wave[layout]),
        "input_features_mask": lambda: torch.ones(batch, frames, dtype=torch.bool),
        "encoder_hidden_states": lambda: normal(batch, length, width),
        "query_embeds": lambda: normal(batch, length, width),
        "bbox": lambda: torch.zeros(batch, length, 4, dtype=torch.long),
        "inputs_embeds": lambda: normal(batch, length, width),
        "hidden_states": lambda: normal(batch, length, width),
        "past_values": lambda: normal(batch, context, _number(config, "num_input_channels", "input_size", default=1)),
        "spectrogram": lambda: normal(batch, bins, 24),
    }
    accepted = inspect.signature(model.forward).parameters
    required = [name for name, p in accepted.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    main = getattr(model, "main_input_name", None)
    if "grid_thw" in required:  # images of many sizes, cut into patches that lie in one row
        patch = _number(config, "patch_size", default=14)
        pixels = channels * _number(config, "temporal_patch_size", default=1) * patch**2
        patches = normal(batch * 16, pixels)
        ways |= {"hidden_states": lambda: patches, "pixel_values": lambda: patches}
        ways |= {"grid_thw": lambda: torch.tensor([[1, 4, 4]] * batch)}
    if layout == 1 and main != "input_ids" and "input_ids" in accepted:  # text alone
        return {"input_ids": tokens()}
    wanted = dict.fromkeys([*([main] if main in accepted else []), *required])
    if main == "input_ids" and layout % 2 == 0 and "attention_mask" in accepted:
        wanted |= {"attention_mask": None}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        wanted |= {"decoder_input_ids": None}
    return {name: ways[name]() for name in wanted if name in ways}


def input_ways(model: PreTrainedModel) -> Iterator[Callable[[int], dict[str, Any] | None]]:
    """Functions of a seed: what the library makes up itself, two of these in one batch, and inputs by name."""

    def twice(seed: int) -> dict[str, Any] | None:
        parts = [example_inputs_of(model, 2 * seed + index) for index in (0, 1)]
        return parts[0] and {name: torch.cat([part[name] for part in parts if part]) for name in parts[0]}

    yield twice
    yield lambda seed: example_inputs_of(model, seed)
    for layout in range(3):
        yield lambda seed, layout=layout: made_inputs(model, layout, seed)


def floats(outputs: Any) -> list[Tensor]:
    """All floating tensors of a model's outputs, in order."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    return [tensor for part in outputs for tensor in floats(part)] if isinstance(outputs, (list, tuple)) else []


def evaluate(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Outputs in eval mode, the mode put back."""
    training = model.training
    with torch.no_grad():
        found = [tensor.clone() for tensor in floats(model.eval()(**inputs))]
    model.train(training)
    return found

"""StoMPPConfig: JSON and command-line round trips, presets, and a clear refusal of everything else."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import HfArgumentParser

from stompp_hf import BinaryLinear, StoMPPConfig, StoMPPError
from stompp_hf.errors import ConfigError
from stompp_hf.method.schedules import SCHEDULES

UNUSUAL: dict[str, Any] = {
    "binarize": "weights",
    "frozen_gradient": "clipped_ste",
    "surrogate_width": 2.5,
    "pending_lr": 0.25,
    "binary_lr": 20.0,
    "scale_lr": 0.2,
    "last_stage": "3",
    "order": "encoder.layer.3,encoder.layer.1",
    "schedule": "cosine",
    "refresh_rate": 7,
    "stages": "6",
    "within_stage": "forward",
    "start": 0.125,
    "end": 0.75,
    "weight_scale": "group",
    "group_size": 32,
    "learn_weight_scale": False,
    "weight_clip": 0.5,
    "activation_scale": "none",
    "learn_activation_scale": False,
    "activation_threshold": "none",
    "learn_activation_threshold": False,
    "activation_levels": "symmetric",
    "activation_clip": 2.0,
    "target_modules": ["query", "key"],
    "exclude_modules": ["pooler"],
    "scale_gradient": "lsq",
    "relu": "keep",
    "gelu": "relu",
    "conv_padding": "one",
    "first_layer": "binarize",
    "head": "binarize",
    "downsampling": "binarize",
    "embeddings": "binarize",
    "keep_dtype": True,
    "check_every": 0,
    "mask_seed": 11,
}

BAD: list[tuple[str, dict[str, Any]]] = [
    *[
        (name, {name: "none of these"})
        for name in (
            *("binarize", "frozen_gradient", "within_stage", "weight_scale", "activation_scale", "first_layer"),
            *("activation_threshold", "activation_levels", "head", "schedule", "stages"),
            *(
                "downsampling",
                "scale_gradient",
                "relu",
                "gelu",
                "conv_padding",
                "activation_mask",
                "attention",
                "embeddings",
            ),
        )
    ],
    *[
        (name, {name: value})
        for name in ("refresh_rate", "check_every", "group_size")
        for value in (-1, 1.5, "7", True)
    ],
    *[(name, {name: None}) for name in ("check_every", "group_size")],
    ("refresh_rate", {"refresh_rate": 0}),
    ("group_size", {"weight_scale": "group", "group_size": 0}),
    ("group_size", {"group_size": 64}),
    ("group_size", {"weight_scale": "tensor", "group_size": 64}),
    *[(name, {name: value}) for name in ("start", "end") for value in (-0.1, 1.1, float("nan"), "0.5", None, True)],
    ("start", {"start": 0.9, "end": 0.5}),
    ("start", {"start": 0.9}),
    *[
        (name, {name: value})
        for name in ("weight_clip", "activation_clip")
        for value in (0.0, -1.0, float("inf"), float("nan"), "1", True)
    ],
    *[("binary_lr", {"binary_lr": value}) for value in (-0.1, 0.0, float("nan"), float("inf"), "1", True)],
    *[("pending_lr", {"pending_lr": value}) for value in (-0.1, 1.5, float("nan"), "1", True, None)],
    *[
        (name, {name: value})
        for name in ("surrogate_width", "scale_lr")
        for value in (0.0, -1.0, float("inf"), "1", True, None)
    ],
    *[
        (name, {name: value})
        for name in ("learn_weight_scale", "learn_activation_scale", "learn_activation_threshold", "keep_dtype")
        for value in ("false", None, 1)
    ],
    *[("mask_seed", {"mask_seed": value}) for value in ("x", 1.5, None)],
    *[(name, {name: value}) for name in ("target_modules", "exclude_modules") for value in ([], [""], "", [1], 3)],
    *[("order", {"order": value}) for value in ("", " , ", [], None, 3, ["a", 3])],
    *[("stages", {"stages": value}) for value in (0, -1, "0", "1.5", None)],
    ("schedule", {"schedule": None}),
    ("learn_weight_scale", {"weight_scale": "none"}),
    ("learn_activation_scale", {"activation_scale": "none", "activation_levels": "symmetric"}),
    ("learn_activation_threshold", {"activation_threshold": "none", "activation_levels": "symmetric"}),
    *[("gelu", {"gelu": "relu", "relu": relu}) for relu in ("drop", "rprelu")],
    ("conv_padding", {"conv_padding": "one", "activation_mask": "element"}),
    ("attention", {"attention": "binarize", "binarize": "weights"}),
    ("attention", {"attention": "binarize", "activation_mask": "element"}),
    ("activation_levels", {"activation_scale": "none", "learn_activation_scale": False}),
    ("activation_levels", {"activation_threshold": "none", "learn_activation_threshold": False}),
]


def changed(before: StoMPPConfig, after: StoMPPConfig) -> dict[str, Any]:
    """The options in which two configurations differ, with their later values."""
    old, new = before.to_dict(), after.to_dict()
    assert old.keys() == new.keys()
    return {name: value for name, value in new.items() if value != old[name]}


# ---- round trips ----


@pytest.mark.parametrize("config", [StoMPPConfig(), StoMPPConfig.paper(), StoMPPConfig(**UNUSUAL)])
def test_json_round_trip(config: StoMPPConfig, tmp_path: Path) -> None:
    path = tmp_path / "stompp.json"
    text = config.to_json(path)
    assert path.read_text(encoding="utf-8") == text
    assert json.loads(text) == config.to_dict()
    assert StoMPPConfig.from_json(text) == config
    assert StoMPPConfig.from_json(path) == config
    assert StoMPPConfig.from_json(str(path)) == config
    assert StoMPPConfig.from_dict(config.to_dict()) == config


def test_unusual_covers_every_option() -> None:
    assert changed(StoMPPConfig(), StoMPPConfig(**UNUSUAL)) == UNUSUAL
    # Element masks and padding with one exclude each other, and so do binary attention and binary weights alone.
    assert UNUSUAL.keys() | {"activation_mask", "attention"} == StoMPPConfig().to_dict().keys()
    assert changed(StoMPPConfig(), StoMPPConfig(activation_mask="element")) == {"activation_mask": "element"}
    assert changed(StoMPPConfig(), StoMPPConfig(attention="binarize")) == {"attention": "binarize"}


def test_equal_ways_to_write_an_option() -> None:
    assert StoMPPConfig(target_modules="query") == StoMPPConfig(target_modules=["query"])
    assert StoMPPConfig(exclude_modules=("a", "b")) == StoMPPConfig(exclude_modules=["a", "b"])
    assert StoMPPConfig(stages=6) == StoMPPConfig(stages="6")
    assert StoMPPConfig(order=["a", "b.*"]) == StoMPPConfig(order="a,b.*")


@pytest.mark.parametrize(
    ("order", "patterns"),
    [
        ("forward", []),
        ("reverse", []),
        ("global", []),
        ("a", ["a"]),
        ("a, b.1 ,", ["a", "b.1"]),
        (["b", "a"], ["b", "a"]),
    ],
)
def test_order_patterns(order: str | list[str], patterns: list[str]) -> None:
    assert StoMPPConfig(order=order).order_patterns == patterns


def test_command_line() -> None:
    flags = [
        *("--binarize", "weights", "--frozen_gradient", "zero", "--schedule", "linear", "--refresh_rate", "50"),
        *("--stages", "4", "--start", "0.1", "--end", "0.9", "--weight_clip", "0.5", "--order", "b,a"),
        *("--target_modules", "query", "key", "--no_learn_weight_scale", "--keep_dtype", "--mask_seed", "3"),
        *("--weight_scale", "group", "--group_size", "32"),
        *("--learn_activation_scale", "False"),
    ]
    (config,) = HfArgumentParser(StoMPPConfig).parse_args_into_dataclasses(flags)
    assert changed(StoMPPConfig(), config) == {
        "binarize": "weights",
        "frozen_gradient": "zero",
        "schedule": "linear",
        "refresh_rate": 50,
        "stages": "4",
        "start": 0.1,
        "end": 0.9,
        "weight_clip": 0.5,
        "order": "b,a",
        "target_modules": ["query", "key"],
        "weight_scale": "group",
        "group_size": 32,
        "learn_weight_scale": False,
        "learn_activation_scale": False,
        "keep_dtype": True,
        "mask_seed": 3,
    }
    assert HfArgumentParser(StoMPPConfig).parse_args_into_dataclasses([]) == (StoMPPConfig(),)


def test_every_option_has_help() -> None:
    text = HfArgumentParser(StoMPPConfig).format_help()
    for name, option in StoMPPConfig.__dataclass_fields__.items():
        assert f"--{name}" in text and len(option.metadata["help"]) > 20


# ---- presets ----


def test_paper_values() -> None:
    """s = a = c = hi = 1, lo = -1, b = o = 0; cubic, r = 100, forward, layer by layer, STE-free, over the whole run."""
    assert StoMPPConfig.paper().to_dict() == {
        "binarize": "weights_and_activations",
        "frozen_gradient": "zero",
        "order": "forward",
        "schedule": "cubic",
        "refresh_rate": 100,
        "stages": "module",
        "within_stage": "together",
        "start": 0.0,
        "end": 1.0,
        "weight_scale": "none",
        "group_size": 128,
        "learn_weight_scale": False,
        "weight_clip": 1.0,
        "activation_scale": "none",
        "learn_activation_scale": False,
        "activation_threshold": "none",
        "learn_activation_threshold": False,
        "activation_levels": "symmetric",
        "activation_clip": 1.0,
        "activation_mask": "feature",
        "surrogate_width": 1.5,
        "pending_lr": 1.0,
        "binary_lr": 1.0,
        "scale_lr": 1.0,
        "last_stage": None,
        "scale_gradient": "sum",
        "relu": "drop",
        "gelu": "keep",
        "conv_padding": "zero",
        "target_modules": None,
        "exclude_modules": None,
        "first_layer": "keep",
        "head": "keep",
        "downsampling": "keep",
        "attention": "keep",
        "embeddings": "keep",
        "keep_dtype": False,
        "check_every": 100,
        "mask_seed": 0,
    }
    assert changed(StoMPPConfig.paper(), StoMPPConfig.paper(frozen_gradient="ste")) == {"frozen_gradient": "ste"}


def test_paper_values_reach_the_layer() -> None:
    layer = BinaryLinear.convert(nn.Linear(3, 2), StoMPPConfig.paper())
    layer.calibrate_weight()
    assert layer.weight_scale.tolist() == [1.0]
    assert layer.weight_clip.tolist() == layer.activation_scale.tolist() == layer.activation_high.tolist() == [1.0]
    assert layer.activation_low.tolist() == [-1.0]
    assert layer.activation_threshold is None and layer.activation_offset == 0.0
    assert dict(layer.named_parameters()).keys() == {"weight", "bias"}


def test_defaults_for_fine_tuning() -> None:
    config = StoMPPConfig()
    assert (config.schedule, config.refresh_rate, config.order) == ("cubic", None, "forward")
    assert config.binary_weights and config.binary_activations
    assert all(option in SCHEDULES for option in ("cubic", "cosine", "linear", "quadratic", "flipped_quadratic"))


@pytest.mark.parametrize("config", [StoMPPConfig(), StoMPPConfig.paper(), StoMPPConfig(**UNUSUAL)])
def test_baselines_change_only_what_they_say(config: StoMPPConfig) -> None:
    before = config.to_dict()
    vanilla, real = config.as_vanilla_ste(), config.as_full_precision()
    surrogate = {"zero": "ste"}.get(config.frozen_gradient, config.frozen_gradient)
    says = {"start": 0.0, "end": 0.0, "frozen_gradient": surrogate}
    assert vanilla.to_dict() == {**before, **says}
    assert real.to_dict() == {**before, "binarize": "nothing", "pending_lr": 1.0, "binary_lr": 1.0, "scale_lr": 1.0}
    assert config.to_dict() == before
    assert not real.binary_weights and not real.binary_activations


@pytest.mark.parametrize(
    ("binarize", "weights", "activations"),
    [("weights_and_activations", True, True), ("weights", True, False), ("nothing", False, False)],
)
def test_what_is_binary(binarize: str, weights: bool, activations: bool) -> None:
    config = StoMPPConfig(binarize=binarize)
    assert (config.binary_weights, config.binary_activations) == (weights, activations)


# ---- refusals ----


@pytest.mark.parametrize(("name", "options"), BAD, ids=str)
def test_bad_options_are_refused_by_name(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        StoMPPConfig(**options)
    assert f"{name}=" in str(error.value)
    assert isinstance(error.value, (StoMPPError, ValueError))


@pytest.mark.parametrize(
    ("wrong", "near"), [("refresh_rates", "refresh_rate"), ("frozen_grad", "frozen_gradient"), ("schedul", "schedule")]
)
def test_unknown_option_names_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"{wrong}.*did you mean '{near}'"):
        StoMPPConfig.from_dict({wrong: 1})
    with pytest.raises(ConfigError, match=near):
        StoMPPConfig.from_json(json.dumps({wrong: 1}))


def test_unknown_option_like_no_other_lists_all() -> None:
    with pytest.raises(ConfigError, match="refresh_rate"):
        StoMPPConfig.from_dict({"zzz": 1})
    with pytest.raises(ConfigError, match="dictionary"):
        StoMPPConfig.from_dict([1])  # type: ignore[arg-type]

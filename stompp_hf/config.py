"""StoMPPConfig: every option of the library in one dataclass, with all its checks."""

import dataclasses
import difflib
import json
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import ConfigError
from .method.schedules import SCHEDULES
from .method.surrogates import SURROGATES

METHOD = "stompp"
ORDERS = ("forward", "reverse", "global")
GROUP_SIZE = 128
"""That of llama.cpp's Q1_0."""


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


@dataclass
class StoMPPConfig:
    """What is binarized, when, and what frozen entries pass back.

    The defaults suit fine-tuning a pre-trained checkpoint; `StoMPPConfig.paper()` is the rule of Smith and Islam
    (2026) without scales and thresholds. Works as a dataclass of `HfArgumentParser`, and survives a JSON round trip.

    Raises:
        ConfigError: an option, or a pair of options, that makes no sense; the message shows a call that works.
    """

    binarize: Literal["weights_and_activations", "weights", "nothing"] = _option(
        "weights_and_activations",
        "What becomes binary: weights and the activations that enter each layer (BNN, W1A1), weights only (BWN, "
        "W1A32), or nothing (full precision, as a baseline on the same code path).",
    )
    frozen_gradient: str = _option(
        "windowed_ste",
        "What frozen entries pass back: zero (STE-free), ste (identity surrogate), clipped_ste (identity inside the "
        "clip range), windowed_ste (for activations, identity near the threshold: see surrogate_width; for weights, "
        "identity), or one of your own (register_surrogate). Unfrozen entries always pass their true gradient.",
    )
    surrogate_width: float = _option(
        1.5, "Half width of windowed_ste's window |u - b| < width * a around an activation's threshold."
    )
    order: str = _option(
        "forward",
        "Order in which stages freeze: forward (input to output), reverse, global (all at once), or a comma-separated "
        "list of module names or patterns (in Python also a list of strings).",
    )
    schedule: str = _option("cubic", f"Frozen fraction over a stage's window: one of {', '.join(SCHEDULES)}.")
    refresh_rate: int | None = _option(
        None,
        "Soft refresh r: each step redraws the membership of 1/r of the entries; unset: a fifth of the stage's window, "
        "at most 100.",
    )
    stages: str = _option(
        "block", "What freezes together: module, block (a repeated layer of the model), or a number of equal stages."
    )
    within_stage: Literal["together", "forward"] = _option(
        "together", "Modules of one stage share its window (together), or split it in execution order (forward)."
    )
    start: float = _option(0.0, "Fraction of the run at which the first stage's window opens.")
    end: float = _option(0.5, "Fraction of the run at which the last stage is frozen; start = end = 0 is vanilla STE.")
    last_stage: str | None = _option(
        None,
        "Last stage to freeze: its number (from 1; 0: none), its name, or the share of the stages that freeze, as 0.5. "
        "Those behind it stay real for good, and the rest freezes when it would have; unset: all freeze.",
    )
    pending_lr: float = _option(
        1.0,
        "Learning rate of what is still real, in units of the optimizer's: stages whose window has not opened, and "
        "until the first one opens everything else.",
    )
    binary_lr: float | None = _option(
        None,
        "Learning rate of binary layers from the time that their window opens (latents, scales, thresholds), in units "
        "of the optimizer's, which so may be the one that suits real weights; unset: what brings it up to "
        "0.02 / sqrt(fan-in), never below 1 (1 under SGD).",
    )
    scale_lr: float = _option(
        1.0,
        "Learning rate of the scales and thresholds of binary layers, in units of that of their latents (binary_lr).",
    )
    weight_scale: Literal["none", "tensor", "channel", "group"] = _option(
        "channel",
        "Magnitude of a binary weight: 1 (none), one value a tensor, one an output channel, or one for each group of "
        "group_size weights side by side along the input of an output channel.",
    )
    group_size: int = _option(
        GROUP_SIZE,
        "Weights that share a scale (weight_scale=group); the last group of a channel holds what is left.",
    )
    learn_weight_scale: bool = _option(True, "Train the weight scales (they start at mean |w|) instead of fixing them.")
    weight_clip: float | None = _option(
        None, "Clip of unfrozen weights at -c and c; unset: wide enough that nothing is clipped."
    )
    activation_scale: Literal["none", "layer"] = _option(
        "layer", "Magnitude of a binary activation: 1 (none), or one value a layer."
    )
    learn_activation_scale: bool = _option(True, "Train the activation scales instead of fixing them.")
    activation_threshold: Literal["none", "zero", "mean"] = _option(
        "zero",
        "Threshold b of sign(u - b), one a feature: none (b = 0), starting at zero, or at the mean of the feature.",
    )
    learn_activation_threshold: bool = _option(True, "Train the thresholds instead of fixing them.")
    scale_gradient: Literal["sum", "lsq"] = _option(
        "sum",
        "Gradients of scales and thresholds: the sum over their entries (sum), or that divided by the square root of "
        "how many these are (lsq: weights of a channel or group, activations of one sample), so that they do not fill "
        "the norm that a script clips, nor the steps of SGD.",
    )
    activation_levels: Literal["symmetric", "auto"] = _option(
        "auto", "Levels {-a, a} everywhere (symmetric), or {0, 2a} where the input has one sign (auto: ReLU, GELU)."
    )
    activation_clip: float | None = _option(
        None, "Clip of unfrozen activations at -c and c; unset: the range of the calibration data, with a margin."
    )
    activation_mask: Literal["feature", "element"] = _option(
        "feature",
        "What one entry of an activation's mask stands for: a feature (a channel, for convolutions), or one element of "
        "a sample (fixed input size).",
    )
    relu: Literal["absorb", "keep", "drop", "rprelu"] = _option(
        "absorb",
        "A ReLU (ReLU6, Hardswish) before binary activations: absorb it into the layers it feeds where nothing else "
        "reads it (nothing changes at the start), keep it, drop it wherever it feeds one (also after additions, and "
        "GELU, SiLU and Mish too; also before layers that last_stage leaves real), or rprelu: make every such ReLU an "
        "RPReLU, with learnable shifts and slope (a ReLU "
        "at the start).",
    )
    gelu: Literal["keep", "relu"] = _option(
        "keep",
        "A GELU (SiLU, Mish) before binary activations: keep it, or make it a ReLU, whose outputs fit two levels {0, "
        "2a}, from the first step on, and absorb or keep that as `relu` says (also before layers that last_stage "
        "leaves real). A teacher keeps its own.",
    )
    conv_padding: Literal["zero", "one"] = _option(
        "zero",
        "What pads a binary input of a convolution: zero, or one (the upper level), which keeps it exactly two-valued.",
    )
    target_modules: list[str] | None = _option(None, "Names or patterns of the modules to binarize; unset: all.")
    exclude_modules: list[str] | None = _option(None, "Names or patterns of modules to leave real.")
    first_layer: Literal["keep", "binarize"] = _option("keep", "Layers that run before the first repeated block.")
    head: Literal["keep", "binarize"] = _option("keep", "Layers that run after the last repeated block.")
    downsampling: Literal["keep", "binarize"] = _option("keep", "Down-sampling layers and convolutions of shortcuts.")
    attention: Literal["keep", "binarize"] = _option(
        "keep",
        "The products inside attention: keep them real, or binarize queries, keys and values to {-a, a} and the "
        "probabilities to {0, 2a}, in modules that go through transformers' AttentionInterface.",
    )
    embeddings: Literal["keep", "binarize"] = _option(
        "keep",
        "The model's word embedding: keep it real, or binarize its rows (a scale a row, or, by groups, several).",
    )
    keep_dtype: bool = _option(False, "Keep half-precision latent weights (small updates vanish) instead of float32.")
    check_every: int = _option(100, "Look for non-finite activations every this many steps; 0 never looks.")
    mask_seed: int = _option(0, "Seed of the masks, apart from the seed of the run.")

    def __post_init__(self) -> None:
        if isinstance(self.order, (list, tuple)) and all(isinstance(item, str) for item in self.order):
            self.order = ",".join(self.order)
        self.stages = str(self.stages)
        if self.last_stage is not None and not isinstance(self.last_stage, bool):
            self.last_stage = str(self.last_stage)
        for option in dataclasses.fields(self):
            choices = getattr(option.type, "__args__", None) if "Literal" in str(option.type) else None
            if choices and getattr(self, option.name) not in choices:
                self._refuse(option.name, f"is not one of {', '.join(map(repr, choices))}")
            if option.default is None:
                continue  # HfArgumentParser takes the None out of its type
            if option.type in (bool, int, str) and type(getattr(self, option.name)) is not option.type:
                self._refuse(option.name, f"must be a plain {option.type.__name__}")  # "false" would count as true
        home = "stompp_hf.method"
        for name, registry, how in (
            ("frozen_gradient", SURROGATES, f"registered first, with {home}.surrogates.register_surrogate(name)"),
            ("schedule", SCHEDULES, f"added first, {home}.schedules.SCHEDULES[name] = function"),
        ):
            if getattr(self, name) not in registry:
                known = ", ".join(map(repr, registry))
                why = f"is not one of {known}; one of your own is {how}, also before a model is loaded that uses it"
                self._refuse(name, why)
        if not self.order_patterns and self.order not in ORDERS:
            self._refuse("order", f"is empty; use one of {', '.join(ORDERS)}, or a list of module names")
        if self.stages not in ("module", "block") and not (self.stages.isdecimal() and int(self.stages) > 0):
            self._refuse("stages", "is neither 'module' nor 'block' nor a positive number, as in stages=6")
        last, share = self.last_stage, _number(self.last_stage)
        if last is not None and (not isinstance(last, str) or not last.strip()):
            self._refuse("last_stage", "is no stage; use a number, a name, or a share, as in last_stage=3")
        if share is not None and not (last or "").isdecimal() and not 0.0 < share <= 1.0:
            self._refuse("last_stage", "is neither a whole number nor a share between 0 and 1, as in last_stage=0.5")
        if self.refresh_rate is not None and (type(self.refresh_rate) is not int or self.refresh_rate < 1):
            self._refuse("refresh_rate", "must be a whole number of at least 1, as in refresh_rate=100, or None")
        if self.group_size < 1:
            self._refuse("group_size", "must be a whole number of at least 1, as in group_size=128")
        if self.group_size != GROUP_SIZE and self.weight_scale != "group":
            self._refuse("group_size", "has no groups to size: add weight_scale='group'")
        if self.check_every < 0:
            self._refuse("check_every", "must be 0 (never) or a positive number of steps")
        for name in ("start", "end"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
                self._refuse(name, "must be a fraction of the run, between 0 and 1")
        rate = self.pending_lr
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0.0 <= rate <= 1.0:
            self._refuse("pending_lr", "must be between 0 and 1, as in pending_lr=0.1")
        if self.start > self.end:
            self._refuse("start", f"is after end={self.end}; use start <= end, as in start=0.1, end=0.8")
        needed = ("surrogate_width", "scale_lr")
        for name in ("weight_clip", "activation_clip", "binary_lr", *needed):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            unset = value is None and name not in needed
            if not unset and not (number and 0.0 < value < float("inf")):
                self._refuse(name, "must be a positive number" + ("" if name in needed else ", or None"))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is None:
                continue
            names = [value] if isinstance(value, str) else value
            if not (isinstance(names, (list, tuple)) and names and all(isinstance(n, str) and n for n in names)):
                self._refuse(name, "must be a list of names or patterns, or None")
            setattr(self, name, list(names))
        learnt = {"weight_scale": "channel", "activation_scale": "layer", "activation_threshold": "zero"}
        for name, value in learnt.items():
            if getattr(self, name) == "none" and getattr(self, f"learn_{name}"):
                what = name.partition("_")[2]
                self._refuse(f"learn_{name}", f"needs a {what}: add {name}={value!r}, or set it to False")
        if self.gelu == "relu" and self.relu not in ("absorb", "keep"):
            self._refuse("gelu", f"does not go with relu={self.relu!r}; use relu='absorb' or relu='keep' with it")
        if self.activation_mask == "element" and self.conv_padding == "one":
            self._refuse("conv_padding", "has no mask around it; use activation_mask='feature' with it")
        if self.attention == "binarize" and self.binarize == "weights":
            self._refuse("attention", "has no weights; use binarize='weights_and_activations' with it")
        if self.attention == "binarize" and self.activation_mask == "element":
            self._refuse("attention", "has no fixed number of elements; use activation_mask='feature' with it")
        if self.activation_levels == "auto" and "none" in (self.activation_scale, self.activation_threshold):
            self._refuse(
                "activation_levels",
                "needs a scale and a threshold; use activation_levels='symmetric', or activation_scale='layer' with "
                "activation_threshold='zero'",
            )

    def _refuse(self, name: str, why: str) -> None:
        raise ConfigError(f"StoMPPConfig: {name}={getattr(self, name)!r} {why}.")

    @property
    def quant_method(self) -> str:
        """The name by which from_pretrained(..., quantization_config=StoMPPConfig(...)) finds this library."""
        return METHOD

    @property
    def order_patterns(self) -> list[str]:
        """The patterns of an explicit order; empty for forward, reverse and global."""
        return [] if self.order in ORDERS else [item.strip() for item in self.order.split(",") if item.strip()]

    @property
    def is_ste_free(self) -> bool:
        """Whether frozen entries pass no gradient."""
        return not SURROGATES[self.frozen_gradient].passes

    @property
    def binary_weights(self) -> bool:
        """Whether weights become binary."""
        return self.binarize != "nothing"

    @property
    def binary_activations(self) -> bool:
        """Whether activations become binary."""
        return self.binarize == "weights_and_activations"

    @classmethod
    def paper(cls, **options: Any) -> "StoMPPConfig":
        """The rule of Smith and Islam (2026): sign and clip at 1, no scale, no threshold, STE-free, module by module.

        What feeds binary activations is dropped if it is a ReLU (this library's reading: sign(relu(u)) would be
        constant) or a GELU, SiLU or Mish (sign(gelu(u)) is +1 for u < -6 too, in float32, and u is a sum of signs).

        Their StoMPP+STE is `StoMPPConfig.paper(frozen_gradient="ste")`.
        """
        values: dict[str, Any] = {
            "frozen_gradient": "zero",
            "binary_lr": 1.0,
            "refresh_rate": 100,
            "stages": "module",
            "start": 0.0,
            "end": 1.0,
            "weight_scale": "none",
            "learn_weight_scale": False,
            "weight_clip": 1.0,
            "activation_scale": "none",
            "learn_activation_scale": False,
            "activation_threshold": "none",
            "learn_activation_threshold": False,
            "activation_levels": "symmetric",
            "activation_clip": 1.0,
            "relu": "drop",
        }
        return cls(**{**values, **options})

    def as_vanilla_ste(self) -> "StoMPPConfig":
        """The baseline: everything frozen from step 0, with this configuration's surrogate (STE-free: identity)."""
        surrogate = "ste" if self.is_ste_free else self.frozen_gradient
        return dataclasses.replace(self, start=0.0, end=0.0, frozen_gradient=surrogate)

    def as_full_precision(self) -> "StoMPPConfig":
        """The same code path with nothing binarized."""
        return dataclasses.replace(self, binarize="nothing", pending_lr=1.0, binary_lr=1.0, scale_lr=1.0)

    def to_dict(self) -> dict[str, Any]:
        """All options as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "StoMPPConfig":
        """The inverse of `to_dict`; an unknown option raises ConfigError and names the nearest one."""
        if not isinstance(values, dict):
            raise ConfigError(f"StoMPPConfig.from_dict needs a dictionary of options, not {type(values).__name__}.")
        known = [option.name for option in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(known)}."
                raise ConfigError(f"StoMPPConfig has no option {name!r}; {hint}")
        return cls(**values)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The options as a JSON text, written to `path` when one is given."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> "StoMPPConfig":
        """Options from a JSON text, or from the path of a JSON file."""
        text = str(source)
        if not text.lstrip().startswith("{"):
            with open(source, encoding="utf-8") as file:
                text = file.read()
        return cls.from_dict(json.loads(text))

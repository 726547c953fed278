"""BinaryLayer: what every binary layer shares. The concrete classes add an nn class and its product.

A layer is converted in place (its `__class__` changes), so parameters keep their names and identity, and hooks, ties
and flags hold. Its state is set from outside, by `Progression`; forward only reads it, and draws nothing.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import hardtanh

from ..config import StoMPPConfig
from ..errors import NotCalibratedError
from ..functional import hard, mix_activation, mix_weight
from .calibration import ActivationValues, Observer, activation_values
from .frozen import frozen_product
from .product import Product

PENDING, TRANSITION, FROZEN = "pending", "transition", "frozen"

OWN_TENSORS = (
    "weight_scale",
    "weight_clip",
    "activation_scale",
    "activation_threshold",
    "activation_low",
    "activation_high",
    "stompp_state",
)
"""Names of the parameters and buffers that conversion adds to a layer."""

_OWN_ATTRIBUTES = (
    *("stompp_config", "input_producer", "stage_state", "frozen_share", "weight_mask", "activation_mask", "observer"),
    *("weight_edge", "input_edges", "weight_ready", "activation_ready", "activation_offset"),
    *("total_steps", "step", "fingerprint"),
)

WEIGHT_CLIP_MARGIN = 1.5
"""Clip of unfrozen weights where none is set, in units of max |w|: latents have room to grow while they are real."""

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object


class BinaryLayer(_Module):
    """A layer whose weight, and whose input, become binary entry by entry.

    Forward, by state: pending: the plain layer (clipped, where a clip is set); in transition:
    product(mix_activation(x), mix_weight(w)) + bias; frozen: `frozen_product`. See `functional` and `modules.frozen`
    for formulas and gradients.

    Extra tensors (parameters when learnable, buffers otherwise): weight_scale (out,) or (1,); weight_clip (1,);
    activation_scale, activation_low, activation_high (1,); activation_threshold (in,); stompp_state int64 (6,).

    Raises:
        NotCalibratedError: a committed layer runs before its activation values were set.
    """

    plain_class: ClassVar[type[nn.Module]]
    product: ClassVar[Product]

    weight: Tensor
    bias: Any  # a parameter or None; plain classes declare it in different ways
    weight_scale: Tensor
    weight_clip: Tensor
    activation_scale: Tensor | None
    activation_threshold: Tensor | None
    activation_low: Tensor | None
    activation_high: Tensor | None
    stompp_state: Tensor

    stompp_config: StoMPPConfig
    input_producer: str | None
    stage_state: str
    weight_mask: Tensor | None
    activation_mask: Tensor | None
    observer: Observer | None
    frozen_share: float

    # Mirrors in Python of what the buffers save: forward must not wait for a device to read a flag or a clip.
    weight_edge: float | None
    input_edges: tuple[float | None, float | None]
    weight_ready: bool
    activation_ready: bool
    activation_offset: float
    total_steps: int
    step: int
    fingerprint: int

    @classmethod
    def convert(cls, module: nn.Module, config: StoMPPConfig, producer: str | None = None) -> "BinaryLayer":
        """Turn a plain layer into this class, in place, and return it."""
        layer: Any = module
        layer.__class__ = cls
        weight = layer.weight
        channels = weight.shape[cls.product.channel_dim] if config.weight_scale == "channel" else 1
        features = weight.shape[cls.product.feature_dim]
        value = {"dtype": weight.dtype, "device": weight.device}
        wide = float("inf")

        layer._own("weight_scale", torch.ones(channels, **value), config.learn_weight_scale)
        layer._own("weight_clip", torch.full((1,), config.weight_clip or wide, **value))
        if config.binary_activations:
            clip = config.activation_clip or wide
            layer._own("activation_scale", torch.ones(1, **value), config.learn_activation_scale)
            threshold = None if config.activation_threshold == "none" else torch.zeros(features, **value)
            layer._own("activation_threshold", threshold, config.learn_activation_threshold)
            layer._own("activation_low", torch.full((1,), -clip, **value))
            layer._own("activation_high", torch.full((1,), clip, **value))
        else:
            for name in ("activation_scale", "activation_threshold", "activation_low", "activation_high"):
                layer._own(name, None)
        layer._own("stompp_state", torch.zeros(6, dtype=torch.int64, device=weight.device))

        layer.stompp_config, layer.input_producer = config, producer
        layer.stage_state, layer.frozen_share = PENDING, 0.0
        layer.weight_mask = layer.activation_mask = layer.observer = None
        layer.weight_ready = layer.activation_ready = False
        layer.activation_offset = 0.0
        layer.weight_edge, layer.input_edges = config.weight_clip, (None, None)
        if config.binary_activations and config.activation_clip is not None:
            layer.input_edges = (-config.activation_clip, config.activation_clip)
        layer.total_steps = layer.step = layer.fingerprint = 0
        _rebind_forward(layer)
        return layer

    def restore(self) -> nn.Module:
        """Turn this layer back into its plain class, in place, with its latent weight."""
        layer: Any = self
        for name in (*OWN_TENSORS, *_OWN_ATTRIBUTES):
            if hasattr(layer, name):  # a conversion that failed halfway set only some
                delattr(layer, name)
        layer.__class__ = type(self).plain_class
        _rebind_forward(layer)
        return layer

    def _own(self, name: str, value: Tensor | None, learnable: bool = False) -> None:
        if learnable and value is not None:
            parameter = nn.Parameter(value, requires_grad=True)
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # init_weights() leaves it alone
            self.register_parameter(name, parameter)
        else:
            self.register_buffer(name, value)

    # ---- state, set by Progression ----

    def enter(self, state: str, frozen_share: float) -> None:
        """Set the state; outside a transition the masks are dropped."""
        self.stage_state, self.frozen_share = state, frozen_share
        if state != TRANSITION:
            self.weight_mask = self.activation_mask = None

    def masked_tensors(self) -> dict[str, torch.Size]:
        """Shapes of the masks that a transition needs, by the attribute that holds them."""
        shapes = {"weight_mask": self.weight.shape}
        if self.stompp_config.binary_activations:
            shapes["activation_mask"] = torch.Size((self.weight.shape[self.product.feature_dim],))
        return shapes

    def calibrate_weight(self) -> None:
        """Set the weight's scale and clip from the latents: s = mean |w|, c = WEIGHT_CLIP_MARGIN * max |w|."""
        if self.weight_ready:
            return
        config = self.stompp_config
        with torch.no_grad():
            size = self.weight.detach().abs()
            if config.weight_scale != "none":
                channel = self.product.channel_dim
                others = [d for d in range(size.dim()) if d != channel or config.weight_scale == "tensor"]
                self.weight_scale.copy_(size.to(torch.float64).mean(others).reshape(self.weight_scale.shape))
            if config.weight_clip is None:
                self.weight_clip.copy_((size.max() * WEIGHT_CLIP_MARGIN).reshape(1))
        self.weight_ready = True
        self._read_edges()

    @property
    def needs_activation_values(self) -> bool:
        """Whether any activation value is taken from data."""
        config = self.stompp_config
        return config.binary_activations and (
            config.activation_scale != "none"
            or config.activation_threshold == "mean"
            or config.activation_levels == "auto"
            or config.activation_clip is None
        )

    def calibrate_activation(self, rows: Tensor) -> None:
        """Set the activation's values from rows of this layer's input, (rows, features)."""
        config = self.stompp_config
        values = activation_values(rows, config.activation_threshold, config.activation_levels, self.input_producer)
        self._set_activation(values)
        self.activation_ready = True

    def _set_activation(self, values: ActivationValues) -> None:
        config = self.stompp_config
        with torch.no_grad():
            if self.activation_scale is not None and config.activation_scale != "none":
                self.activation_scale.copy_(values.scale)
            if self.activation_threshold is not None:
                self.activation_threshold.copy_(values.threshold)
            if self.activation_low is not None and self.activation_high is not None and config.activation_clip is None:
                self.activation_low.copy_(values.low)
                self.activation_high.copy_(values.high)
        self.activation_offset = values.offset
        self._read_edges()

    def _read_edges(self) -> None:
        def number(buffer: Tensor | None) -> float | None:
            value = float("inf") if buffer is None else float(buffer)
            return value if abs(value) < float("inf") else None

        self.weight_edge = number(self.weight_clip)
        self.input_edges = number(self.activation_low), number(self.activation_high)

    # ---- forward ----

    def forward(self, input: Tensor) -> Tensor:  # named as in nn.Linear, for callers that pass it by name
        x, state = input, self.stage_state
        observer = self.observer
        if observer is not None and self.training:
            observer.see(x)
            if not self.activation_ready and self.frozen_share > 0.0 and observer.rows:
                # Committed before any step of a window: the first call decides, so that later layers see what is so.
                self.calibrate_activation(observer.rows[0])
        if state == PENDING or (state == TRANSITION and self.frozen_share == 0.0):
            return self._unfrozen(x)
        if not self.activation_ready and self.needs_activation_values:
            raise NotCalibratedError(
                f"{type(self).__name__} (stage state {state}) has no activation values yet: they are set by the first "
                "training step of its stage. Call stompp_hf.calibrate(model, batches) to set them from data now."
            )
        if state == FROZEN:
            return self._frozen(x)
        return self._in_transition(x)

    def _unfrozen(self, x: Tensor) -> Tensor:
        config = self.stompp_config
        weight_clip, clip = config.weight_clip, config.activation_clip if config.binary_activations else None
        if config.binarize == "nothing" or (weight_clip is None and clip is None):
            return self.plain_class.forward(self, x)  # nothing is clipped: the original layer, bit for bit
        if clip is not None:
            x = hardtanh(x, -clip, clip)
        weight = self.weight if weight_clip is None else hardtanh(self.weight, -weight_clip, weight_clip)
        return self._add_bias(self.product(x, weight))

    def _add_bias(self, z: Tensor) -> Tensor:
        return z if self.bias is None else z.add_(self.product.per_channel(self.bias.to(z.dtype), z))

    def _in_transition(self, x: Tensor) -> Tensor:
        weight = mix_weight(
            self.weight, self._weight_shaped(self.weight_scale), _mask(self.weight_mask), self.weight_edge,
            self.stompp_config.frozen_gradient,
        )  # fmt: skip
        if self.activation_scale is not None:
            features = self.product.per_feature
            threshold = self.activation_threshold
            x = mix_activation(
                x if x.dtype == self.weight.dtype else x.to(self.weight.dtype),
                self.activation_scale,
                None if threshold is None else features(threshold, x),
                features(_mask(self.activation_mask), x),
                *self.input_edges,
                self.activation_offset,
                self.stompp_config.frozen_gradient,
            )
        return self._add_bias(self.product(x, weight))

    def _frozen(self, x: Tensor) -> Tensor:
        # Signs are summed in float32 whatever the precision around: a sum of integers must not be rounded.
        exact = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        kind = x.device.type
        mixed = torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if mixed else contextlib.nullcontext():
            y = frozen_product(
                x.to(exact),
                self.weight.to(exact),
                self.weight_scale.to(exact),
                None if self.activation_scale is None else self.activation_scale.to(exact),
                None if self.activation_threshold is None else self.activation_threshold.to(exact),
                None if self.bias is None else self.bias.to(exact),
                (*self.input_edges, self.weight_edge),
                self.product,
                self.activation_offset,
                self.stompp_config.frozen_gradient,
            )
        return y.to(torch.get_autocast_dtype(kind) if mixed else self.weight.dtype)

    def _weight_shaped(self, per_channel: Tensor) -> Tensor:
        shape = [1] * self.weight.dim()
        shape[self.product.channel_dim] = -1
        return per_channel.reshape(shape)

    def binary_weight(self) -> Tensor:
        """The weight of the layer once frozen: s * sign(w), shape and dtype of the latent weight, no gradient."""
        return (hard(self.weight.detach()) * self._weight_shaped(self.weight_scale.detach())).contiguous()

    # ---- saving ----

    def write_state(self) -> None:
        """Put the Python mirrors into the buffer that is saved."""
        values = [
            *(int(self.weight_ready), int(self.activation_ready), int(self.activation_offset)),
            *(self.total_steps, self.step, self.fingerprint),
        ]
        if not self.stompp_state.is_meta:
            self.stompp_state.copy_(torch.tensor(values, dtype=torch.int64))

    def read_state(self) -> None:
        """Put the saved buffer into the Python mirrors (after loading)."""
        if self.stompp_state.is_meta:
            return
        weight, activation, offset, total, step, fingerprint = self.stompp_state.tolist()
        self.weight_ready, self.activation_ready = bool(weight), bool(activation)
        self.activation_offset = float(offset)
        self._read_edges()
        self.total_steps, self.step, self.fingerprint = total, step, fingerprint

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.write_state()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found = [name for name in OWN_TENSORS if prefix + name in state_dict]
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if found:
            self.read_state()
        else:  # a checkpoint of the plain model: our own tensors keep their values, and their absence is no error
            own = {prefix + name for name in OWN_TENSORS}
            missing_keys[:] = [key for key in missing_keys if key not in own]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        for name in ("weight_mask", "activation_mask"):
            mask = getattr(self, name, None)
            if mask is not None:  # masks are no buffers: nothing saves or broadcasts them, so they move by hand
                setattr(self, name, fn(mask))
        return result

    def extra_repr(self) -> str:
        return f"{self.plain_class.extra_repr(self)}, {self.stompp_config.binarize}, {self.stage_state}"

    @contextlib.contextmanager
    def values_kept(self) -> Iterator[None]:
        """Restore calibrated values, flags and state on leaving the block."""
        tensors = {n: getattr(self, n).detach().clone() for n in OWN_TENSORS if getattr(self, n) is not None}
        flags = (self.weight_ready, self.activation_ready, self.activation_offset)
        edges = (self.weight_edge, self.input_edges)
        place = (self.stage_state, self.frozen_share, self.weight_mask, self.activation_mask, self.observer)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in tensors.items():
                    getattr(self, name).copy_(value)
            self.weight_ready, self.activation_ready, self.activation_offset = flags
            self.weight_edge, self.input_edges = edges
            self.stage_state, self.frozen_share, self.weight_mask, self.activation_mask, self.observer = place


def _mask(mask: Tensor | None) -> Tensor:
    if mask is None:
        raise RuntimeError("a layer in transition has no mask; its state is set by Progression.step(step)")
    return mask


def _rebind_forward(layer: Any) -> None:
    """accelerate's hooks keep the bound forward of the class that a module had when they were added."""
    if "_old_forward" in layer.__dict__:
        layer._old_forward = type(layer).forward.__get__(layer)

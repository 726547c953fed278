"""LayerState: the tensors that a binary layer owns beside its weight, and their starting values."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..integrations.sharding import assign, whole
from ..method.layer_product import Product
from ..method.mask_bits import pack_mask, unpack_mask
from ..method.weight_scales import mean_sizes, over_weight, scale_shape
from .calibration import NO_EDGE, ActivationValues, Observer, activation_values, unseen_values
from .stage_member import Member

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

WEIGHT_CLIP_MARGIN = 1.5
"""Clip of unfrozen weights where none is set, in units of max |w|: latents have room to grow while they are real."""


def finite_edge(buffer: Tensor | None) -> float | None:
    """A clip's edge as a number; None where nothing is clipped."""
    value = NO_EDGE if buffer is None else float(buffer)
    return value if abs(value) < NO_EDGE else None


class LayerState(Member):
    """What a binary layer keeps: its own tensors, mirrors of them in Python, and its place in the progression."""

    own_names: ClassVar[tuple[str, ...]] = OWN_TENSORS
    mask_names = ("weight_mask", "activation_mask")
    masks_in_bits = ("weight_mask",)
    edge_names = ("weight_clip", "activation_low", "activation_high")

    weight: Tensor
    bias: Any  # a parameter or None; plain classes declare it in different ways
    weight_scale: Tensor
    weight_clip: Tensor
    activation_scale: Tensor | None
    activation_threshold: Tensor | None
    activation_low: Tensor | None
    activation_high: Tensor | None

    product: Product
    input_producer: str | None
    absorbed: str | None
    sample_shape: tuple[int, ...] | None
    weight_mask_bits: Tensor | None
    activation_mask: Tensor | None
    weight_edge: float | None
    input_edges: tuple[float | None, float | None]

    @property
    def like(self) -> Tensor:
        return self.weight

    @property
    def weight_mask(self) -> Tensor | None:
        """Which entries of its weight are frozen, as booleans that are made of bits, so ask once; or None."""
        bits = self.weight_mask_bits
        return None if bits is None else unpack_mask(bits, self.weight.shape)

    @weight_mask.setter
    def weight_mask(self, mask: Tensor | None) -> None:
        self.weight_mask_bits = None if mask is None else pack_mask(mask)

    @property
    def latent(self) -> Tensor | None:
        return self.weight

    @property
    def fan_in(self) -> int:
        return self.weight.numel() // self.weight.shape[self.product.channel_dim]

    def expected_sizes(self) -> dict[str, tuple[Tensor, int]]:
        config = self.stompp_config
        scales = scale_shape(config.weight_scale, config.group_size, self.weight.shape, self.product.channel_dim)
        sizes = {"scale": (self.weight_scale, math.prod(scales))}
        if self.activation_threshold is not None:
            sizes["threshold"] = self.activation_threshold, self.product.features(self.weight)
        return sizes

    # ---- starting values ----

    def calibrate_weight(self) -> None:
        """Set the weight's scale and clip from the latents: s = mean |w|, c = WEIGHT_CLIP_MARGIN * max |w|."""
        if self.follow().weight_ready:
            return
        config = self.stompp_config
        with torch.no_grad():
            size = whole(self.weight).abs()
            if not bool(size.isfinite().all()):
                raise NonFiniteError(
                    f"the latent weight of {self.place.label or 'this layer'} is not finite where its stage begins. "
                    "Lower the learning rate, or clip gradients (max_grad_norm); then resume from the last checkpoint."
                )
            if config.weight_scale != "none":
                channel = self.product.channel_dim
                assign(self.weight_scale, mean_sizes(size, config.weight_scale, config.group_size, channel))
            if config.weight_clip is None:
                self.weight_clip.copy_((size.max() * WEIGHT_CLIP_MARGIN).reshape(1))
        self.freezing.weight_ready = 1
        self._wrote()

    _needs_weight_values = True

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
        self._refuse_infinite(values)
        self._set_activation(values)

    def calibrate_observed(self, observer: Observer, first_call: bool = False) -> None:
        features = self.product.features(self.weight)
        self.calibrate_activation(observer.rows[0] if first_call else observer.seen(features, self.weight))

    def calibrate_unseen(self) -> None:
        config, features = self.stompp_config, self.product.features(self.weight)
        self._set_activation(unseen_values(whole(self.weight), features, config.activation_levels, self.input_producer))

    def _set_activation(self, values: ActivationValues) -> None:
        config = self.stompp_config
        with torch.no_grad():
            if self.activation_scale is not None and config.activation_scale != "none":
                assign(self.activation_scale, values.scale)
            if self.activation_threshold is not None:
                assign(self.activation_threshold, values.threshold)
            if self.activation_low is not None and self.activation_high is not None and config.activation_clip is None:
                self.activation_low.copy_(values.low)
                self.activation_high.copy_(values.high)
        self.freezing.activation_ready, self.freezing.activation_offset = 1, int(values.offset)
        self._wrote()

    def _read_edges(self) -> None:
        self.weight_edge = finite_edge(self.weight_clip)
        self.input_edges = finite_edge(self.activation_low), finite_edge(self.activation_high)

    def _weight_shaped(self, scale: Tensor) -> Tensor:
        return over_weight(scale, self.stompp_config.group_size, self.weight.shape, self.product.channel_dim)

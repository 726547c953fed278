"""LayerState: the tensors that a binary layer owns beside its weight, their starting values, and how they are saved."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import StoMPPConfig
from .calibration import ActivationValues, Observer, activation_values
from .product import Product

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

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object


class LayerState(_Module):
    """What a binary layer keeps: its own tensors, mirrors of them in Python, and its place in the progression."""

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
    product: Product
    input_producer: str | None
    absorbed: str | None
    sample_shape: tuple[int, ...] | None
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

    def _own(self, name: str, value: Tensor | None, learnable: bool = False) -> None:
        if learnable and value is not None:
            parameter = nn.Parameter(value, requires_grad=True)
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # init_weights() leaves it alone
            self.register_parameter(name, parameter)
        else:
            self.register_buffer(name, value)

    # ---- starting values ----

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

    def _weight_shaped(self, per_channel: Tensor) -> Tensor:
        shape = [1] * self.weight.dim()
        shape[self.product.channel_dim] = -1
        return per_channel.reshape(shape)

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

"""BinaryLayer: what every binary layer shares. The concrete classes add an nn class and its product.

A layer is converted in place (its `__class__` changes), so parameters keep their names and identity, and hooks, ties
and flags hold. Its state is set from outside, by `Progression`; forward only reads it, and draws nothing.
"""

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import hardtanh

from ..config import StoMPPConfig
from ..errors import NotCalibratedError, ShapeError
from ..integrations.accelerate import rebind_forward
from ..integrations.torch import graph_number
from ..method.frozen_product import frozen_product
from ..method.grouped_product import grouped_product
from ..method.layer_product import Product
from ..method.mixed_product import Mixture, mixed_product
from ..method.mixing import Edge, hard
from ..method.sign_bits import SignBits
from ..method.weight_scales import is_grouped, scale_shape
from .activations import ABSORBABLE, gate
from .calibration import NO_EDGE
from .layer_state import OWN_TENSORS, LayerState
from .stage_member import FROZEN, PENDING, filled
from .weight_guard import KeptWeight

_OWN_ATTRIBUTES = (
    *("stompp_config", "place", "freezing", "observer", "_draws", "_seen", "weight_mask_bits", "activation_mask"),
    *("input_producer", "absorbed", "sample_shape", "weight_edge", "input_edges"),
)


class BinaryLayer(KeptWeight, LayerState):
    """A layer whose weight, and whose input, become binary entry by entry.

    Forward, by state: pending: the plain layer (clipped, where a clip is set); in transition: `mixed_product`; frozen:
    `frozen_product`, or, with a scale a group, `grouped_product`. See these for formulas and gradients. Where the
    activation f in front of it was absorbed, x is the value before f, real entries compute with f(x), and every
    gradient to x passes through f.

    Extra tensors (parameters when learnable, buffers otherwise): weight_scale (out,), (1,), or (out, groups);
    weight_clip, activation_scale, activation_low, activation_high (1,); activation_threshold (in,); stompp_state int64
    (6,).

    Raises:
        NotCalibratedError: a committed layer runs before its activation values were set.
        ShapeError: activation_mask="element", and the input is not of the shape that the masks have.
    """

    plain_class: ClassVar[type[nn.Module]]
    weight_name: ClassVar[str] = "weight"
    """The tensor that holds its binary weight: latents, or signs."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Binary layers are converted or copied, never built: what PEFT builds as type(base_layer)(...) is to be real.
        return cls.plain_class(*args, **kwargs) if args or kwargs else super().__new__(cls)

    @classmethod
    def convert(
        cls,
        module: nn.Module,
        config: StoMPPConfig,
        producer: str | None = None,
        absorbed: str | None = None,
        sample_shape: tuple[int, ...] | None = None,
    ) -> "BinaryLayer":
        """Turn a plain layer into this class, in place, and return it.

        Args:
            module: the layer, of type `plain_class`.
            config: the options.
            producer: class name of the module whose output enters the layer, if known.
            absorbed: the activation (a key of `ABSORBABLE`) that this layer computes in place of its producer.
            sample_shape: shape of one sample of the input, without the batch; for activation_mask="element".
        """
        layer: Any = module
        layer.__class__ = cls
        weight = layer.weight
        scales = scale_shape(config.weight_scale, config.group_size, weight.shape, layer.product.channel_dim)
        layer._own("weight_scale", filled(scales, 1.0, weight), config.learn_weight_scale)
        layer._own("weight_clip", filled((1,), config.weight_clip or NO_EDGE, weight))
        if config.binary_activations:
            edge = config.activation_clip or NO_EDGE
            layer._own("activation_scale", filled((1,), 1.0, weight), config.learn_activation_scale)
            features = None if config.activation_threshold == "none" else layer.product.features(weight)
            threshold = None if features is None else filled((features,), 0.0, weight)
            layer._own("activation_threshold", threshold, config.learn_activation_threshold)
            layer._own("activation_low", filled((1,), -edge, weight))
            layer._own("activation_high", filled((1,), edge, weight))
        else:
            for name in ("activation_scale", "activation_threshold", "activation_low", "activation_high"):
                layer._own(name, None)
        layer._begin(config, weight)
        clip = config.activation_clip if config.binary_activations else None
        vars(layer).update(
            input_producer=producer,
            absorbed=absorbed,
            sample_shape=None if sample_shape is None else tuple(sample_shape),
            weight_edge=config.weight_clip,
            input_edges=(None, None) if clip is None else (-clip, clip),
        )
        layer._looked()
        rebind_forward(layer)
        return layer

    def restore(self) -> nn.Module:
        """Turn this layer back into its plain class, in place, with its latent weight."""
        layer: Any = self
        for name in (*OWN_TENSORS, *_OWN_ATTRIBUTES):
            if hasattr(layer, name):  # a conversion that failed halfway set only some
                delattr(layer, name)
        layer.__class__ = type(self).plain_class
        rebind_forward(layer)
        return layer

    # ---- state, set by Progression ----

    def masked_tensors(self) -> dict[str, torch.Size]:
        """Shapes of the masks that a transition needs, by their names."""
        shapes = {"weight_mask": self.weight.shape}
        if self.stompp_config.binary_activations:
            element = self.stompp_config.activation_mask == "element" and self.sample_shape is not None
            features = (self.product.features(self.weight),)
            shapes["activation_mask"] = torch.Size(self.sample_shape if element else features)  # type: ignore[arg-type]
        return shapes

    # ---- forward ----

    def forward(self, input: Tensor) -> Tensor:  # named as in nn.Linear, for callers that pass it by name
        x, freezing, observer = input, self.follow(), self.observer
        looks = observer is not None and self.training and observer.looks()
        if observer is not None and looks:
            seen = self._activated(x)
            observer.see(self.product.rows(seen), self.product.places(seen))
            if not freezing.activation_ready and freezing.has_frozen and observer.rows:
                # Committed before any step of a window: the first call decides, so that later layers see what is so.
                self.calibrate_activation(observer.rows[0])
        if freezing.stage == PENDING or not freezing.has_frozen:
            return self._unfrozen(self.with_idle(x))
        if not freezing.activation_ready and self.needs_activation_values:
            if x.numel() == 0 or (looks and freezing.stage != FROZEN):
                return self._unfrozen(x)  # an expert without a token, or padding alone: the next step may bring more
            raise NotCalibratedError(
                f"{type(self).__name__} (stage state {freezing.stage}) has no activation values yet: they are set "
                "by the first training step of its stage. Call stompp_hf.calibrate(model, batches) to set them now."
            )
        if freezing.stage == FROZEN:
            return self._frozen(x)
        return self._in_transition(x)

    def _unfrozen(self, x: Tensor) -> Tensor:
        config = self.stompp_config
        x = self._activated(x)
        weight_clip, clip = config.weight_clip, config.activation_clip if config.binary_activations else None
        if self.always_real or (weight_clip is None and clip is None):
            return self.plain_class.forward(self, x)  # nothing is clipped: the original layer, bit for bit
        if clip is not None:
            x = hardtanh(x, -clip, clip)
        weight = self.weight if weight_clip is None else hardtanh(self.weight, -weight_clip, weight_clip)
        return self._add_bias(self._product_of(x)(x, weight))

    def _activated(self, x: Tensor) -> Tensor:
        return x if self.absorbed is None else ABSORBABLE[self.absorbed](x)

    def _gated(self, x: Tensor) -> Tensor:
        """The value before the absorbed activation, with the gradient of the value after it."""
        return gate(x, self.absorbed) if self.absorbed is not None and self.surrogate.passes else x

    def _product_of(self, x: Tensor) -> Product:
        """The product for this very input: a convolution's padding may depend on its size."""
        return self.product

    def _pad_level(self) -> float:
        """What a constant padding of a frozen input holds, in units of the activation scale."""
        return 0.0

    def _add_bias(self, z: Tensor) -> Tensor:
        return z if self.bias is None else z.add_(self.product.per_channel(self.bias.to(z.dtype), z))

    def _in_transition(self, x: Tensor) -> Tensor:
        real = mask = None
        weight_mask_bits = _mask(self.weight_mask_bits)
        if self.activation_scale is None:
            x = self._activated(x)
        else:
            mask = self._placed_mask(x)
            if self.absorbed is not None:
                x = x.to(self.weight.dtype)
                real, x = self._activated(x), self._gated(x)
        mixture = Mixture(
            self._product_of(x),
            self._edges_now(),
            self.activation_offset,
            self._pad_level(),
            self.surrogate,
            self._window(),
            self._weight_shaped,
        )
        weight_scale, *of_input = self._values_for(x)
        tensors = (x, real, self.weight, weight_scale, weight_mask_bits, *of_input, mask)
        return self._add_bias(mixed_product(mixture, *tensors))

    def _learnt_scale(self) -> Tensor:
        """s, with its gradient in the units that were chosen."""
        scale = self.weight_scale
        entries = self.weight_count // scale.shape[0]
        entries = min(self.stompp_config.group_size, entries) if is_grouped(scale) else entries
        return self.in_units(scale, entries)  # type: ignore[no-any-return]

    def _values_for(self, x: Tensor) -> list[Any]:
        """s, a and b for this input, with their gradients in the units that were chosen."""
        entries = math.prod(x.shape[1:])
        features = self.activation_threshold.shape[0] if self.activation_threshold is not None else 1
        return [
            self._learnt_scale(),
            self.in_units(self.activation_scale, entries),
            self.in_units(self.activation_threshold, entries // features),
        ]

    def _edges_now(self) -> tuple[Edge, Edge, Edge]:
        """Low and high of the input, and the weight's clip; in a compiled graph as tensors, which layers can share."""
        if torch.compiler.is_compiling():
            return self.activation_low, self.activation_high, self.weight_clip
        return (*self.input_edges, self.weight_edge)

    def _window(self) -> Any:
        return graph_number(self.stompp_config.surrogate_width, self.weight_scale)

    def _placed_mask(self, x: Tensor) -> Tensor:
        mask = _mask(self.activation_mask)
        if self.stompp_config.activation_mask == "feature":
            return self.product.per_feature(mask, x)
        if x.shape[1:] != mask.shape:
            raise ShapeError(
                f"{type(self).__name__}: activation_mask='element' has masks for inputs of shape {tuple(mask.shape)} "
                f"a sample, and this one has {tuple(x.shape[1:])}. Keep the size fixed, pass binarize_model(model, "
                "config, example_inputs=...) a batch of that size, or use activation_mask='feature'."
            )
        return mask

    def _frozen(self, x: Tensor) -> Tensor:
        # Signs are summed in float32 whatever the precision around: a sum of integers must not be rounded.
        exact = torch.float64 if self.weight_scale.dtype == torch.float64 else torch.float32
        kind = x.device.type
        mixed = not x.is_meta and torch.is_autocast_enabled(kind)
        narrow = torch.get_autocast_dtype(kind) if mixed else None
        with torch.autocast(kind, enabled=False) if mixed else contextlib.nullcontext():
            y = self._frozen_product(
                self._gated(x).to(exact),
                self._signed(exact),
                *(None if value is None else value.to(exact) for value in self._values_for(x)),
                None if self.bias is None else self.bias.to(exact),
                self._edges_now() if self.surrogate.reads_clip else (None, None, None),
                self._product_of(x),
                self.activation_offset,
                self._pad_level(),
                self.surrogate,
                self._window(),
                narrow,
            )
        return y.to(narrow or self.output_dtype)

    @property
    def _frozen_product(self) -> Callable[..., Tensor]:
        grouped = is_grouped(self.weight_scale)
        return partial(grouped_product, group_size=self.stompp_config.group_size) if grouped else frozen_product

    def _signed(self, dtype: torch.dtype) -> Tensor | SignBits:
        """What gives the frozen product the weight's signs."""
        return self.weight.to(dtype)

    @property
    def output_dtype(self) -> torch.dtype:
        """Dtype of the output, outside autocast."""
        return self.weight.dtype

    @property
    def weight_count(self) -> int:
        """Number of binary weights."""
        return self.weight.numel()

    # ---- what reports ask for ----

    @property
    def plain_kind(self) -> str:
        return self.plain_class.__name__

    def bits(self) -> tuple[list[int], list[int]]:
        config, dtype = self.stompp_config, self.output_dtype
        return self._bits_of(config.binary_weights, dtype), self._bits_of(config.binary_activations, dtype)

    def binary_weights_in(self, name: str) -> int:
        return self.weight_count if name == self.weight_name and not self.always_real else 0

    def packed_bytes(self, name: str, tensor: Tensor) -> int | None:
        if name == "weight" and not self.always_real:
            return SignBits.of(tensor.detach().to("meta"), self.product.channel_dim).bits.nbytes
        return super().packed_bytes(name, tensor)

    def binary_weight(self) -> Tensor:
        """The weight of the layer once frozen: s * sign(w), shape and dtype of the latent weight, no gradient."""
        return (hard(self.weight.detach()) * self._weight_shaped(self.weight_scale.detach())).contiguous()

    def extra_repr(self) -> str:
        return f"{self.plain_class.extra_repr(self)}, {self.stompp_config.binarize}, {self.stage_state}"


def _mask(mask: Tensor | None) -> Tensor:
    if mask is None:
        raise RuntimeError("a layer in transition has no mask; its state is set by Progression.step(step)")
    return mask

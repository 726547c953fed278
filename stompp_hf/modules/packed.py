"""Packed members: what is frozen for good, with the signs of its weight as bits in place of latents.

A frozen member is packed in place (its `__class__` changes), so names, hooks and the readers of paused dropouts hold.
Each packed class is a subclass of its binary class, and so of its nn class.
"""

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..errors import PackingError, WeightError
from ..integrations.accelerate import rebind_forward
from ..integrations.torch import buffers_of
from ..kernels import DTYPES, Route
from ..method.layer_product import affine
from ..method.packed_product import packed_forward
from ..method.sign_bits import SignBits, unpack_signs
from ..method.weight_scales import is_grouped, over_weight
from .attention import BinaryAttention
from .binary_layer import BinaryLayer
from .conv import BinaryConv1d, BinaryConv2d, BinaryConv3d
from .embedding import BinaryEmbedding
from .followed_affine import FollowedAffine
from .layer_state import OWN_TENSORS
from .linear import BinaryConv1D, BinaryLinear
from .prechecked_linear import StraightForward
from .stage_member import FROZEN, Member

_HALF = (torch.float16, torch.bfloat16)


class PackedMember(Member):
    """A member that stays frozen. Its own tensors stay in float32 when a model is cast to half precision.

    Raises:
        PackingError: it is asked to thaw.
    """

    is_packed = True
    binary_class: ClassVar[type[Member]]
    output_dtype = torch.float32

    @classmethod
    def buffers_of(cls, member: Any) -> dict[str, Tensor | None]:
        """The buffers that a frozen member is packed into; it is not changed."""
        return {}

    @classmethod
    def pack(cls, member: Any, buffers: dict[str, Tensor | None]) -> None:
        """Turn a frozen member into this class, in place, with what `buffers_of` gave."""
        member.__class__ = cls
        for name, buffer in buffers.items():
            member.register_buffer(name, buffer)
        for tensor in member.own_tensors().values():
            if tensor.dtype in _HALF:
                tensor.data = tensor.data.float()
        member.enter(FROZEN, 1.0)

    def unpack(self) -> Member:
        """Turn it back into its binary class, in place, and return it."""
        member: Any = self
        member.__dict__.pop("output_dtype", None)
        member.__class__ = self.binary_class
        return member  # type: ignore[no-any-return]

    def enter(self, state: str, frozen_share: float) -> None:
        if state != FROZEN:
            raise PackingError(
                f"{type(self).__name__} is packed, without latent weights, and cannot go back to the state {state!r}. "
                "Call stompp_hf.unpack_model(model) to train its weights again."
            )
        super().enter(state, frozen_share)

    def _due(self) -> tuple[str, float]:
        return FROZEN, 1.0  # whatever step it was packed at

    def masked_tensors(self) -> dict[str, torch.Size]:
        return {}  # nothing is ever in transition

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.output_dtype = fn(torch.empty(0, dtype=self.output_dtype, device=self.like.device)).dtype
        own = (*self.own_tensors().values(), *self.buffers(recurse=False))
        exact = {id(t) for tensor in own for t in (tensor, tensor.grad) if t is not None and t.is_floating_point()}

        def moved(tensor: Tensor) -> Tensor:
            result: Tensor = fn(tensor)
            narrowed = id(tensor) in exact and result.dtype in _HALF
            return tensor.detach().to(result.device, torch.float32) if narrowed else result

        return super()._apply(moved, recurse)


class PackedLayer(PackedMember, BinaryLayer):
    """A frozen layer whose latent weight is replaced by its signs, 8 a byte.

    Forward and gradients: those of the frozen binary layer, bit for bit in float32 (see `frozen_product`); there is no
    weight to get a gradient.
    Tensors: weight_bits uint8 (out, ceil(weights of one output channel / 8)), and those of `BinaryLayer`, in float32 or
    float64; bias as it was. `weight`, read-only, is made on the fly: s * sign(w), in the dtype of the output.
    Source: the layout and the classes are this library's choice.
    """

    own_names: ClassVar[tuple[str, ...]] = ("weight_bits", *OWN_TENSORS)
    weight_name = "weight_bits"
    weight_bits: Tensor
    weight_shape: torch.Size
    fused: FollowedAffine | None = None
    is_for_inference: ClassVar[bool] = False
    """Whether it was fused for inference alone, and no gradient is ever wanted."""

    @classmethod
    def buffers_of(cls, member: Any) -> dict[str, Tensor | None]:
        return {"weight_bits": SignBits.of(member.weight, member.product.channel_dim).bits}

    @classmethod
    def pack(cls, member: Any, buffers: dict[str, Tensor | None]) -> None:
        latents = member.weight
        del member.weight
        super().pack(member, buffers)
        vars(member).update(weight_shape=latents.shape, output_dtype=latents.dtype)
        rebind_forward(member)

    def unfuse(self) -> None:
        self._let_go()

    def unpack(self) -> Member:
        """Turn it back into its binary class, in place, with latents max(|s|, tiny) * sign(w).

        Their signs are those of the packed weight whatever became of s, and their size is what the scale started from.
        """
        self.unfuse()
        signs, size = self._bits().signs(self.weight_scale.dtype), self.weight_scale.detach().abs()
        latents = signs.mul_(self._weight_shaped(size.clamp_min(torch.finfo(size.dtype).tiny)))
        layer: Any = self
        for name in ("weight_shape", *(name for name in self.own_names if name not in OWN_TENSORS)):
            delattr(layer, name)
        super().unpack()
        layer.weight = nn.Parameter(latents)
        rebind_forward(layer)
        return layer  # type: ignore[no-any-return]

    def restore(self) -> nn.Module:
        layer: Any = self.unpack()
        return layer.restore()  # type: ignore[no-any-return]

    def damage(self, has_nan: bool = True) -> str | None:
        if not self.weight_bits.is_meta and self._bits().has_stray_bits():
            return "weight_bits holds bits behind the end of its rows"
        return super().damage(has_nan)

    # ---- forward ----

    def _frozen(self, x: Tensor) -> Tensor:
        binary, grouped = self.activation_scale is not None, is_grouped(self.weight_scale)
        if binary and not grouped and self.like.dtype == torch.float32:  # one kernel does it all
            threshold, bits = self._operands()
            own = (self.weight_scale, self.activation_scale, threshold, self.bias)
            way = self.product.route(x, bits, *own)
            dtype, product, pad = self._kind(x)
            if way is not Route.TORCH and dtype in DTYPES:
                in_graph = way is Route.OPERATOR
                operands = (x, threshold, bits, self.scale_and_shift() if in_graph else self.followed(), dtype)
                y = packed_forward(*operands, product, pad) if in_graph else product.by_kernel(*operands, pad, way)
                if y is not None:
                    return y
        return super()._frozen(x)

    def followed(self) -> tuple[Tensor, Tensor | None]:
        """`scale_and_shift`, without a gradient; in eval mode kept as long as nothing that they are made of changes."""
        if self.training and not self.is_for_inference:  # some optimizers write where no version counts it
            return self.scale_and_shift()
        if self.fused is None:
            self.fused = FollowedAffine()
        return self.fused.affine(self)

    def goes_straight(self) -> bool:
        """Whether the kernel computes now what the layer is to compute, for an input that it takes."""
        learns = self.training or torch.is_grad_enabled()
        plain = self.activation_scale is not None or self.absorbed is None
        return not learns and plain and not is_grouped(self.weight_scale)

    def train(self, mode: bool = True) -> Any:
        if mode and not self.is_for_inference:
            self._let_go()
        return super().train(mode)

    def _let_go(self) -> None:
        """Forget what was kept from call to call."""
        layer: Any = self
        for name in ("fused", "prepared", "fused_scale", "fused_shift"):
            if name in layer.__dict__ or name in buffers_of(layer):
                delattr(layer, name)

    def scale_and_shift(self) -> tuple[Tensor, Tensor | None]:
        """What follows the product, y = scale * z + shift, in float32: a and the bias, where s stands inside it."""
        offset, bias = self.activation_offset, None if self.bias is None else self.bias.float()
        if is_grouped(self.weight_scale):
            a = self.activation_scale
            return (self.weight_scale.new_ones(1) if a is None else a), bias
        row_sums = self._bits().row_sums(torch.float32) if offset else None
        return affine(self.weight_scale, self.activation_scale, bias, row_sums, offset)

    def _operands(self) -> tuple[Tensor | None, SignBits]:
        return self.activation_threshold, self._bits()

    def _kind(self, x: Tensor) -> tuple[torch.dtype, Any, float]:
        """Dtype of the output, product, and what stands around x."""
        kind = x.device.type
        mixed = not x.is_meta and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if mixed else self.output_dtype
        return dtype, self._product_of(x), self._pad_level() - self.activation_offset

    def _bits(self) -> SignBits:
        return SignBits(self.weight_bits, self.weight_shape, self.product.channel_dim)

    @property
    def fan_in(self) -> int:
        return self._bits().fan_in

    def _signed(self, dtype: torch.dtype) -> SignBits:
        return self._bits()

    def _weight_shaped(self, scale: Tensor) -> Tensor:
        return over_weight(scale, self.stompp_config.group_size, self.weight_shape, self.product.channel_dim)

    @property
    def weight(self) -> Any:
        """s * sign(w), read-only: a new tensor at each call."""
        return self.binary_weight()

    @weight.setter
    def weight(self, value: Tensor) -> None:
        same = value is not None and torch.equal(value, self.binary_weight())
        if not same:  # PEFT's unload() gives a layer the weight that it has
            raise WeightError(f"the weight of a {type(self).__name__} is read-only; stompp_hf.unpack_model(model).")

    @property
    def like(self) -> Tensor:
        return self.weight_scale

    @property
    def latent(self) -> Tensor | None:
        return None

    def expected_sizes(self) -> dict[str, tuple[Tensor, int]]:
        return {}

    @property
    def weight_count(self) -> int:
        return self.weight_shape.numel()

    def binary_weight(self) -> Tensor:
        """s * sign(w), in the shape of the latent weight, no gradient."""
        scale = self.weight_scale.detach()
        return self._bits().signs(scale.dtype).mul_(self._weight_shaped(scale)).to(self.output_dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, packed"


PACKED_CLASSES: dict[type[Member], type[PackedMember]] = {}
_Packed = TypeVar("_Packed", bound=type[PackedMember])


def register_packed(packed_class: _Packed) -> _Packed:
    """Class decorator: add a packed class under its `binary_class`."""
    PACKED_CLASSES[packed_class.binary_class] = packed_class
    return packed_class


@register_packed
class PackedLinear(StraightForward, PackedLayer, BinaryLinear):
    """A packed nn.Linear."""

    binary_class = BinaryLinear


@register_packed
class PackedConv1D(StraightForward, PackedLayer, BinaryConv1D):
    """A packed Conv1D of transformers; its bits lie in rows of output channels, as everywhere."""

    binary_class = BinaryConv1D

    def forward(self, x: Tensor) -> Tensor:  # named as in Conv1D
        return super().forward(x)


@register_packed
class PackedConv1d(PackedLayer, BinaryConv1d):
    """A packed nn.Conv1d."""

    binary_class = BinaryConv1d


@register_packed
class PackedConv2d(PackedLayer, BinaryConv2d):
    """A packed nn.Conv2d."""

    binary_class = BinaryConv2d


@register_packed
class PackedConv3d(PackedLayer, BinaryConv3d):
    """A packed nn.Conv3d."""

    binary_class = BinaryConv3d


@register_packed
class PackedEmbedding(PackedLayer, BinaryEmbedding):
    """A packed nn.Embedding: only the rows that are asked for are unpacked.

    One tensor more, where there is a padding row: padding_lives, bool (1,), whether that row is not all zeros.
    """

    binary_class = BinaryEmbedding
    own_names = ("weight_bits", "padding_lives", *OWN_TENSORS)
    padding_lives: Tensor | None

    @classmethod
    def buffers_of(cls, member: Any) -> dict[str, Tensor | None]:
        lives = None if member.padding_idx is None else member.padding_row_lives().reshape(1)
        return {**super().buffers_of(member), "padding_lives": lives}

    def unpack(self) -> Member:
        dead = self.padding_lives is not None and not bool(self.padding_lives)
        embedding: Any = super().unpack()
        if dead:
            embedding.weight.data[embedding.padding_idx] = 0.0
        return embedding  # type: ignore[no-any-return]

    def padding_row_lives(self) -> Tensor:
        assert self.padding_lives is not None
        return self.padding_lives

    def _frozen(self, x: Tensor) -> Tensor:
        scale = self._scales_of(x)
        rows = unpack_signs(self.weight_bits[x], self.embedding_dim, scale.dtype)
        return (rows * scale).to(self.output_dtype)

    def binary_weight(self) -> Tensor:
        signs = self._bits().signs(self.weight_scale.dtype)
        return signs.mul_(self._spread(self._row_scales().detach())).to(self.output_dtype)


@register_packed
class PackedAttention(PackedMember, BinaryAttention):
    """BinaryAttention, frozen for good; it has no weight."""

    binary_class = BinaryAttention

"""torch's Transformer encoder, which evaluates by one fused operator that reads its linear layers' weights past them.

Real weights would compute then, whatever those layers have become. So an encoder with binary layers takes the way
through its modules, from the moment at which that way gives something else; before, it does what it always did.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .activations import Changed
from .binary_layer import BinaryLayer
from .runtime_classes import made_class, name_for


@contextlib.contextmanager
def module_by_module() -> Iterator[None]:
    """Switch off torch's fused encoder layers and attention, for the time."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class UnfusedTransformerEncoderLayer(Changed, nn.TransformerEncoderLayer):
    """nn.TransformerEncoderLayer with binary layers: not fused once any of them computes as a binary layer."""

    plain_class = nn.TransformerEncoderLayer

    def may_fuse(self) -> bool:
        """Whether the fused operator computes what the modules do."""
        layers: list[BinaryLayer] = [module for module in self.modules() if isinstance(module, BinaryLayer)]
        absorbed = any(layer.absorbed is not None for layer in layers)
        return all(map(_is_plain, layers)) and (absorbed or not isinstance(self.activation, Changed))

    @property
    def activation_relu_or_gelu(self) -> int:  # which activation the fused operator is to compute; 0: it may not
        return self.__dict__["activation_relu_or_gelu"] if self.may_fuse() else 0

    @activation_relu_or_gelu.setter
    def activation_relu_or_gelu(self, value: int) -> None:
        self.__dict__["activation_relu_or_gelu"] = value


class UnfusedTransformerEncoder(Changed, nn.TransformerEncoder):
    """nn.TransformerEncoder of such layers: its nested tensors are for the fused operator, which alone takes them."""

    plain_class = nn.TransformerEncoder

    @property
    def use_nested_tensor(self) -> bool:
        layers = (layer for layer in self.layers if isinstance(layer, UnfusedTransformerEncoderLayer))
        return bool(self.__dict__["use_nested_tensor"]) and all(layer.may_fuse() for layer in layers)

    @use_nested_tensor.setter
    def use_nested_tensor(self, value: bool) -> None:
        self.__dict__["use_nested_tensor"] = value


def _is_plain(layer: BinaryLayer) -> bool:
    """Whether a layer computes as its plain class does, and nobody looks at its input."""
    config = layer.stompp_config
    clips = config.weight_clip, config.activation_clip if config.binary_activations else None
    clipped = config.binarize != "nothing" and clips != (None, None)
    return not (clipped or layer.has_frozen or layer.observer is not None)


def unfuse_encoders(model: nn.Module) -> None:
    """Let torch's encoders with binary layers compute by their modules, in place; `restore` undoes it."""
    modules = list(model.modules())
    for kind, inner in (
        (UnfusedTransformerEncoderLayer, BinaryLayer),
        (UnfusedTransformerEncoder, UnfusedTransformerEncoderLayer),
    ):
        for module in modules:
            fits = isinstance(module, kind.plain_class) and not isinstance(module, kind)
            if fits and any(isinstance(part, inner) for part in module.modules()):
                module.__class__ = _class_for(kind, type(module))


def _class_for(kind: Any, plain: type) -> type:
    if plain is kind.plain_class:
        return kind
    name, bases = name_for(kind, plain), (kind, plain)
    return made_class(_class_for, kind, plain, name, bases, plain_class=plain)  # type: ignore[no-any-return]

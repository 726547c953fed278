"""fuse_for_inference: one scale and one shift follow each packed product, and nothing waits for a gradient."""

import logging
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import PackingError
from ..method.layer_product import LinearProduct
from ..method.weight_scales import is_grouped
from ..modules.embedding import BinaryEmbedding
from ..modules.followed_affine import FollowedAffine
from ..modules.packed import PackedLayer
from ..surgery.members import binary_layers, get_plan, planned_model
from ..surgery.recorder import on_inputs
from ..surgery.unfusing import GRADIENTS
from . import folded_activation
from .folded_activation import FollowedActivation, cut_of
from .folded_batchnorm import FOLDED, FollowedBatchNorm, is_folded_well
from .fused_layers import fuse
from .readers import Fits, Readers
from .separable_pooling import SeparableMaxPool2d

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)


def fuse_for_inference(model: Model, example_inputs: Any = None, *, exact: bool = False) -> Model:
    """Make a packed model as fast as it gets, in place, for inference alone, and return the same model in eval mode.

    Forward:  every packed layer computes y = scale * product(sign(x - b), sign(w)) + shift, scale and shift made once:
              bit for bit what it computed before (those with a scale a group stay as they are). With exact=False, also:
              - a BatchNorm that alone reads a layer's output goes into scale and shift. For each layer this is proven
                by computing both for every whole number that the product can be: they differ by no more than
                `TOLERANCE` of the sum of the sizes of the terms, or the BatchNorm stays, with a warning.
              - a GELU, SiLU or Mish module whose output only linear layers read goes into their thresholds: they take
                the sign of f(u) - b from u itself (see `FollowedActivation`).
              - linear layers with real inputs (W1A32) sum in the order that is fastest (see `kernels.real_linear`).
              - a MaxPool2d takes the maximum of rows, then of columns: the same numbers (see `SeparableMaxPool2d`).
              A rounding difference can flip a sign further down, where a value is that close to its threshold.
    Backward: none; no parameter wants a gradient any more.
    Saving writes the packed model as it was before. `unfuse` undoes it all.
    Source:   this library's choice.

    Args:
        model: a packed model, or a wrapper of one.
        example_inputs: one small batch, to see what reads which output; made from a transformers model's config.
        exact: only what changes no bit.

    Raises:
        NotBinarizedError: the model has no binary layers.
        PackingError: it is not packed, or is fused already.
    """
    root = planned_model(model)
    if not get_plan(root).packed:
        raise PackingError("fuse_for_inference: this model is not packed; call stompp_hf.pack_model(model) first.")
    if hasattr(root, GRADIENTS):
        raise PackingError("fuse_for_inference: this model is fused already; stompp_hf.unfuse(model) undoes it.")
    layers = {n: m for n, m in binary_layers(root).items() if isinstance(m, PackedLayer)}
    layers = {name: layer for name, layer in layers.items() if not isinstance(layer, BinaryEmbedding)}
    by_group = [name for name, layer in layers.items() if is_grouped(layer.weight_scale)]
    if by_group:
        logger.warning("%d layers have a scale a group, which no kernel sums by, and stay as they are.", len(by_group))
    layers = {name: layer for name, layer in layers.items() if name not in by_group}
    followers = {} if exact else _followers(root, layers, example_inputs)
    activations = {} if exact else _activations(root, layers, example_inputs)
    plans: list[tuple[Any, Tensor, Tensor | None, FollowedAffine, Any]] = []
    with torch.no_grad():
        for name, layer in layers.items():
            real = layer.activation_scale is None
            if real and exact:
                continue  # its sums keep torch's order
            norm = None if real else followers.get(layer)
            following = FollowedAffine() if norm is None else FollowedBatchNorm(norm)
            scale, shift = following.made(layer)
            if norm is not None and not is_folded_well(layer, scale, shift, norm):
                logger.warning("%s: its BatchNorm rounds too differently to be folded, and stays.", name)
                norm, following = None, FollowedAffine()
                scale, shift = following.made(layer)
            if (activation := activations.get(layer)) is not None:
                following = FollowedActivation(activation, following)
            plans.append((layer, scale, shift, following, norm))
    for layer, scale, shift, following, norm in plans:
        fuse(layer, scale, shift, following)
        if norm is not None:
            norm.__class__ = FOLDED[type(norm)]
    for activation in set(activations.values()):
        activation.__class__ = folded_activation.FOLDED[type(activation)]
    for module in list(root.modules()):
        if not exact and SeparableMaxPool2d.fits(module):
            module.__class__ = SeparableMaxPool2d
    wanting = {name for name, parameter in root.named_parameters() if parameter.requires_grad}
    root.requires_grad_(False)
    setattr(root, GRADIENTS, wanting)
    model.eval()
    counts = len(plans), sum(norm is not None for *_, norm in plans), len(set(activations.values()))
    logger.info("%d packed layers fused for inference, %d BatchNorms and %d activations folded into them.", *counts)
    return model


def _followers(root: nn.Module, layers: Mapping[str, Any], example_inputs: Any) -> dict[Any, nn.Module]:
    """The BatchNorms that read a layer's output, every time and alone, by the layer."""
    norms = [module for module in root.modules() if type(module) in FOLDED and module.running_mean is not None]
    found = _readers_of(layers.values(), norms, _has_channels_in_place, root, example_inputs, "folded BatchNorms")
    return {layer: next(iter(readers)) for layer, readers in found.items() if len(readers) == 1}


def _has_channels_in_place(layer: Any, norm: Any, x: Tensor) -> bool:
    """Whether a BatchNorm's channels are a layer's: those of a linear layer come last."""
    return hasattr(layer, "stride") or x.dim() == 2


def _activations(root: nn.Module, layers: Mapping[str, Any], example_inputs: Any) -> dict[Any, nn.Module]:
    """The activations whose output only layers read, which can cut for them, by the layer."""
    activations = [module for module in root.modules() if folded_activation.fits(module)]
    binary = [layer for layer in layers.values() if layer.activation_scale is not None]
    linear = [layer for layer in binary if isinstance(layer.product, LinearProduct)]
    found: dict[Any, nn.Module] = {}
    read = _readers_of(activations, linear, _is_float32, root, example_inputs, "folded activations")
    for activation, readers in read.items():
        if all(cut_of(activation, layer) is not None for layer in readers):
            found.update(dict.fromkeys(readers, activation))
        else:
            logger.warning("a %s rounds too differently to be folded, and stays.", type(activation).__name__)
    return found


def _is_float32(activation: Any, layer: Any, x: Tensor) -> bool:
    return x.dtype is torch.float32


def _readers_of(
    makers: Collection[Any], readers: Collection[Any], fits: Fits, root: nn.Module, example_inputs: Any, what: str
) -> dict[Any, set[Any]]:
    """Who alone reads what some modules make, seen in one run; of nobody where there is no input to run the model."""

    def look(inputs: Any) -> Readers:
        seen = Readers(makers, readers, fits)
        seen.record(root, inputs)
        return seen

    if not makers or not readers:
        return {}
    advice = "pass fuse_for_inference(model, example_inputs) one small batch."
    found = on_inputs(root, example_inputs, look, what, advice)
    return {} if found is None else {maker: found.of(maker) for maker in makers}

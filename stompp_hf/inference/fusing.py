"""fuse_for_inference: one scale and one shift follow each packed product, and nothing waits for a gradient."""

import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import PackingError
from ..integrations.torch import has_forward_hooks, tensors_in
from ..method.weight_scales import is_grouped
from ..modules.embedding import BinaryEmbedding
from ..modules.followed_affine import FollowedAffine
from ..modules.packed import PackedLayer
from ..surgery.members import binary_layers, get_plan, planned_model
from ..surgery.recorder import Recorder
from ..surgery.running import example_inputs_of
from ..surgery.unfusing import GRADIENTS
from .folded_batchnorm import FOLDED, FollowedBatchNorm, is_folded_well
from .fused_layers import fuse
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
    plans: list[tuple[Any, Tensor, Tensor | None, FollowedAffine, Any]] = []
    with torch.no_grad():
        for name, layer in layers.items():
            real = layer.activation_scale is None
            if real and exact:
                continue  # its sums keep torch's order
            norm = None if real else followers.get(name)
            following = FollowedAffine() if norm is None else FollowedBatchNorm(norm)
            scale, shift = following.made(layer)
            if norm is not None and not is_folded_well(layer, scale, shift, norm):
                logger.warning("%s: its BatchNorm rounds too differently to be folded, and stays.", name)
                norm, following = None, FollowedAffine()
                scale, shift = following.made(layer)
            plans.append((layer, scale, shift, following, norm))
    for layer, scale, shift, following, norm in plans:
        fuse(layer, scale, shift, following)
        if norm is not None:
            norm.__class__ = FOLDED[type(norm)]
    for module in list(root.modules()):
        if not exact and SeparableMaxPool2d.fits(module):
            module.__class__ = SeparableMaxPool2d
    wanting = {name for name, parameter in root.named_parameters() if parameter.requires_grad}
    root.requires_grad_(False)
    setattr(root, GRADIENTS, wanting)
    model.eval()
    count = sum(norm is not None for *_, norm in plans)
    logger.info("%d packed layers fused for inference, %d BatchNorms folded into them.", len(plans), count)
    return model


def _followers(root: nn.Module, layers: Mapping[str, Any], example_inputs: Any) -> dict[str, nn.Module]:
    """The BatchNorms that read a layer's output, every time and alone, by the layer's name."""
    inputs = example_inputs_of(root) if example_inputs is None else example_inputs
    norms = [module for module in root.modules() if type(module) in FOLDED and module.running_mean is not None]
    if not norms or inputs is None:
        if norms:
            logger.warning("BatchNorms are not folded: pass fuse_for_inference(model, example_inputs) one small batch.")
        return {}
    readers = _Readers(layers, norms)
    readers.record(root, inputs)
    return readers.followers()


class _Readers(Recorder):
    """Notes who reads the layers' outputs."""

    def __init__(self, layers: Mapping[str, Any], norms: list[Any]) -> None:
        self.layers = layers
        self.names = {id(layer): name for name, layer in layers.items()}
        self.made_by = WeakTensorKeyDictionary()
        self.read_by: dict[str, set[Any]] = {}  # BatchNorms, and None for all else
        self.reads_of: dict[Any, set[str | None]] = {norm: set() for norm in norms}
        self.inside: Any = None

    def watches(self, name: str, module: Any) -> bool:
        """Hooks of others could read or replace what passes by."""
        known = id(module) in self.names or module in self.reads_of
        return known and not has_forward_hooks(module)

    def operation(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        self._note(tensors_in((args, kwargs)), self.inside)

    def _note(self, tensors: list[Tensor], reader: Any) -> None:
        for tensor in tensors:
            if (name := self.made_by.get(tensor)) is not None:
                self.read_by.setdefault(name, set()).add(reader)

    def enter(self, name: str, module: Any, args: Any, kwargs: Any) -> None:
        if module not in self.reads_of:
            return
        x = args[0] if args else None
        made = self.made_by.get(x) if isinstance(x, Tensor) else None
        last = made is not None and not hasattr(self.layers[made], "stride")  # a linear layer's channels come last
        self.reads_of[module].add(None if last and args[0].dim() != 2 else made)
        self.inside = module

    def leave(self, name: str, module: Any, args: Any, output: Any) -> None:
        if module in self.reads_of:
            self.inside = None
        else:
            self.made_by[output] = self.names[id(module)]

    def outputs(self, found: list[Tensor]) -> None:
        self._note(found, None)

    def followers(self) -> dict[str, nn.Module]:
        """The pairs that read and are read by nothing else."""
        pairs = {name: next(iter(readers)) for name, readers in self.read_by.items() if len(readers) == 1}
        return {name: norm for name, norm in pairs.items() if norm is not None and self.reads_of[norm] == {name}}

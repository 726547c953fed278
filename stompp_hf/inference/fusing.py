"""fuse_for_inference: one scale and one shift follow each packed product, and nothing waits for a gradient."""

import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import PackingError
from ..modules.embedding import BinaryEmbedding
from ..modules.packed import PackedLayer
from ..surgery.dataflow import plain_outputs
from ..surgery.plan import binary_layers, get_plan, planned_model
from ..surgery.running import example_inputs_of, run, undisturbed
from .folded_batchnorm import FOLDED, FoldedBatchNorm, is_folded_well
from .fused import made
from .separable_pooling import SeparableMaxPool2d

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)
_GRADIENTS = "stompp_gradients"


def fuse_for_inference(model: Model, example_inputs: Any = None, *, exact: bool = False) -> Model:
    """Make a packed model as fast as it gets, in place, for inference alone, and return the same model in eval mode.

    Forward:  every packed layer computes y = scale * product(sign(x - b), sign(w)) + shift, scale and shift made once:
              bit for bit what it computed before. With exact=False, also:
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
    if hasattr(root, _GRADIENTS):
        raise PackingError("fuse_for_inference: this model is fused already; stompp_hf.unfuse(model) undoes it.")
    layers = {n: m for n, m in binary_layers(root).items() if isinstance(m, PackedLayer)}
    layers = {name: layer for name, layer in layers.items() if not isinstance(layer, BinaryEmbedding)}
    followers = {} if exact else _followers(root, layers, example_inputs)
    plans: list[tuple[Any, Tensor, Tensor | None, Any]] = []
    with torch.no_grad():
        for name, layer in layers.items():
            real = layer.activation_scale is None
            if real and exact:
                continue  # its sums keep torch's order
            norm = None if real else followers.get(name)
            scale, shift = made(layer, norm)
            if norm is not None and not is_folded_well(layer, scale, shift, norm):
                logger.warning("%s: its BatchNorm rounds too differently to be folded, and stays.", name)
                norm = None
                scale, shift = made(layer)
            plans.append((layer, scale, shift, norm))
    for layer, scale, shift, norm in plans:
        layer.fuse(scale, shift, norm)
        if norm is not None:
            norm.__class__ = FOLDED[type(norm)]
    for module in list(root.modules()):
        if not exact and SeparableMaxPool2d.fits(module):
            module.__class__ = SeparableMaxPool2d
    wanting = {name for name, parameter in root.named_parameters() if parameter.requires_grad}
    root.requires_grad_(False)
    setattr(root, _GRADIENTS, wanting)
    model.eval()
    count = sum(norm is not None for *_, norm in plans)
    logger.info("%d packed layers fused for inference, %d BatchNorms folded into them.", len(plans), count)
    return model


def unfuse(model: Model) -> Model:
    """Undo `fuse_for_inference`, in place; the model stays packed, and in eval mode. Without effect where not fused.

    Raises:
        NotBinarizedError: the model has no binary layers.
    """
    root = planned_model(model)
    for module in list(root.modules()):
        if isinstance(module, PackedLayer):
            module.unfuse()
        if isinstance(module, FoldedBatchNorm | SeparableMaxPool2d):
            module.restore()
    wanting = root.__dict__.pop(_GRADIENTS, ())
    for name, parameter in root.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name in wanting)
    return model


def _followers(root: nn.Module, layers: Mapping[str, Any], example_inputs: Any) -> dict[str, nn.Module]:
    """The BatchNorms that read a layer's output, every time and alone, by the layer's name."""
    inputs = example_inputs_of(root) if example_inputs is None else example_inputs
    norms = [module for module in root.modules() if type(module) in FOLDED and module.running_mean is not None]
    if not norms or inputs is None:
        if norms:
            logger.warning("BatchNorms are not folded: pass fuse_for_inference(model, example_inputs) one small batch.")
        return {}
    with undisturbed(root), _Readers(layers, norms) as readers:
        readers.close(run(root, inputs))
    return readers.followers()


class _Readers(TorchDispatchMode):
    """Watches who reads the layers' outputs."""

    def __init__(self, layers: Mapping[str, Any], norms: list[Any]) -> None:
        super().__init__()
        self.layers = layers
        self.made_by = WeakTensorKeyDictionary()
        self.read_by: dict[str, set[Any]] = {}  # BatchNorms, and None for all else
        self.reads_of: dict[Any, set[str | None]] = {norm: set() for norm in norms}
        self.inside: Any = None
        self.handles: list[Any] = []
        for name, layer in layers.items():
            if not layer._forward_hooks and not layer._forward_pre_hooks:
                self.handles.append(layer.register_forward_hook(self._made(name)))
        for norm in norms:
            if not norm._forward_hooks and not norm._forward_pre_hooks:
                self.handles.append(norm.register_forward_pre_hook(self._enter))
                self.handles.append(norm.register_forward_hook(self._leave))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs), self.inside)
        return func(*args, **(kwargs or {}))

    def _note(self, values: Any, reader: Any) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and (name := self.made_by.get(tensor)) is not None:
                self.read_by.setdefault(name, set()).add(reader)

    def _made(self, name: str) -> Any:
        def made(module: nn.Module, args: Any, output: Tensor) -> None:
            self.made_by[output] = name

        return made

    def _enter(self, norm: Any, args: Any) -> None:
        x = args[0] if args else None
        name = self.made_by.get(x) if isinstance(x, Tensor) else None
        last = name is not None and not hasattr(self.layers[name], "stride")  # a linear layer's channels come last
        self.reads_of[norm].add(None if last and args[0].dim() != 2 else name)
        self.inside = norm

    def _leave(self, norm: Any, args: Any, output: Any) -> None:
        self.inside = None

    def close(self, outputs: Any) -> None:
        """Note what the model returns."""
        self._note(plain_outputs(outputs), None)

    def followers(self) -> dict[str, nn.Module]:
        """The pairs that read and are read by nothing else."""
        pairs = {name: next(iter(readers)) for name, readers in self.read_by.items() if len(readers) == 1}
        return {name: norm for name, norm in pairs.items() if norm is not None and self.reads_of[norm] == {name}}

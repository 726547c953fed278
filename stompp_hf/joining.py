"""Which fused layers' outputs are read by one packed layer and by nothing else: they hand it bits."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from . import kernels
from .dataflow import plain_outputs
from .modules.joined import join_of
from .running import run, undisturbed

logger = logging.getLogger(__name__)


def join(root: nn.Module, layers: Mapping[str, Any], inputs: Any) -> int:
    """Let fused layers hand each other bits, where one forward pass shows that nothing else reads what flows between.

    Further passes show where the bits arrive, and that no entry of any output changes; else nothing is joined.

    Args:
        root: the model, fused.
        layers: its fused layers, by name.
        inputs: one small batch.

    Returns:
        The number of layers that give bits.
    """
    if kernels.choice().native is None:
        return 0
    with undisturbed(root), _Flow(root, layers) as flow:
        before = _tensors(run(root, inputs))
        flow.read(before, None)
    for name, (reader, between) in flow.pairs().items():
        made = join_of(layers[name], layers[reader], between)
        if made is not None:
            layers[name].join = made
    joined = [layer for layer in layers.values() if "join" in layer.__dict__]
    while joined:
        with undisturbed(root):
            after = _tensors(run(root, inputs))
        lost = [layer for layer in joined if not layer.join.taken]
        same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))
        if not lost and not same:
            logger.warning("no layers hand each other bits: an output was another one with them.")
            lost = joined
        for layer in lost:
            del layer.join
        if not lost:
            break
        joined = [layer for layer in joined if "join" in layer.__dict__]
    return len(joined)


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(plain_outputs(outputs)) if isinstance(leaf, Tensor)]


class _Flow(TorchDispatchMode):
    """Watches every operation and every module that gets a layer's output."""

    def __init__(self, root: nn.Module, layers: Mapping[str, Any]) -> None:
        super().__init__()
        self.names = {layer: name for name, layer in layers.items()}
        self.made_by = WeakTensorKeyDictionary()
        self.read_by: dict[str, set[str | None]] = {}  # names of layers, and None for all else
        self.passed_by: dict[str, dict[nn.Module, None]] = {}
        self.inside: str | None = None
        self.handles: list[Any] = []
        for module in root.modules():
            self.handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._leave))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.read((args, kwargs), self.inside)
        return func(*args, **(kwargs or {}))

    def read(self, values: Any, reader: str | None) -> None:
        """Note who reads what layers made, among these values."""
        for name in self._sources(values):
            self.read_by.setdefault(name, set()).add(reader)

    def _sources(self, values: Any) -> set[str]:
        tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
        return {name for tensor in tensors if (name := self.made_by.get(tensor)) is not None}

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._pass(module, (args, kwargs))
        name = self.names.get(module)
        if name is not None:
            self.read(args[0] if args else kwargs, name)
            self.inside = name

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self.names.get(module)
        if name is not None:
            self.inside = None
            self.made_by[output] = name
        self._pass(module, output)

    def _pass(self, module: nn.Module, values: Any) -> None:
        for name in self._sources(values):
            self.passed_by.setdefault(name, {})[module] = None

    def pairs(self) -> dict[str, tuple[str, list[nn.Module]]]:
        """Layers by name, the one layer that reads them, and every module that the output passes by."""
        found = {}
        for name, readers in self.read_by.items():
            (reader, *others) = readers
            if reader is not None and not others and reader != name:
                found[name] = (reader, list(self.passed_by[name]))
        return found

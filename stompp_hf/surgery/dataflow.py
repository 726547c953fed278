"""What flows where in one forward pass: which layers reach a layer, and who reads an activation's output."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..integrations.torch import tensors_in
from ..modules.activations import BYPASSED, PAUSED
from .recorder import Recorder

EMBEDDING = "<embedding>"
"""Stands in `parents` for any embedding."""

_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)
_PADDING = torch.ops.aten.constant_pad_nd.default
_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


class DataFlow(Recorder):
    """Which tensors of one run reach which candidates.

    Attributes:
        called: the candidates, in the order of their first call.
        bypassed: those of them whose weight something else reads as well; for the probe to find.
        producers: class name of the module whose output enters a candidate, by way of nothing but dropouts.
        parents: the candidates (and EMBEDDING) whose output reaches a candidate's input by way of no other candidate.
        siblings: the candidates that read one and the same tensor, one set a tensor.
        sums: for every addition, the candidates that reach either side.
        readers: the candidates that read an activation's or a dropout's output, itself or by way of dropouts, by name.
        feeders: for every call of a candidate, the activations and dropouts that it reads so.
        elsewhere: activations whose output is read by something that is no candidate.
        one_sided: the candidates whose input was never negative.
        shapes: shape of one sample of a candidate's input.
        widths: for every activation, the (dimensions, second size, last size) of its outputs.
    """

    def __init__(self, candidates: dict[str, nn.Module]) -> None:
        self.called: list[str] = []
        self.bypassed: set[str] = set()
        self.producers: dict[str, str] = {}
        self.parents: dict[str, set[str]] = {}
        self.sums: list[tuple[frozenset[str], frozenset[str]]] = []
        self.readers: dict[str, set[str]] = {}
        self.feeders: dict[str, list[frozenset[str]]] = {}
        self.elsewhere: set[str] = set()
        self.one_sided: dict[str, bool] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        # A weight that something else computes with (fused or tied projections) brings its layer into the flow.
        self._reach = WeakTensorKeyDictionary()
        for name, module in candidates.items():
            self._reach[module.weight] = frozenset([name])
        self._names = {id(module): name for name, module in candidates.items()}
        self._tags = WeakTensorKeyDictionary()
        self._read_by = WeakTensorKeyDictionary()
        self.siblings: list[set[str]] = []
        self.widths: dict[str, set[tuple[int, int, int]]] = {}
        self._kinds: dict[str, type[nn.Module]] = {}
        # What an activation overwrote in place, by address; kept alive, so that no address is used twice.
        self._rewritten: dict[int, tuple[str, Tensor]] = {}
        self._made: dict[tuple[int, torch.Size], tuple[str, Tensor]] = {}  # the same, for what leaf modules gave
        self._inside: list[str | None] = []  # the candidates, or None for a module that only passes on, now running

    def operation(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        inputs = tensors_in((args, kwargs))
        reached: frozenset[str] = frozenset().union(*(self._reach.get(t, ()) for t in inputs))
        if func in _ADDITIONS and len(inputs) == 2:
            left, right = (frozenset(self._reach.get(t, ())) for t in inputs)
            if left and right:
                self.sums.append((left, right))
        if func is _PADDING and (len(args) < 3 or args[2] == 0):  # padding with 0 commutes with what maps 0 to 0
            self._tags[result] = self._tags.get(args[0], frozenset())
        elif not self._inside:
            for tensor in inputs:
                self.elsewhere |= self._tags.get(tensor, frozenset())
                if self._rewritten and tensor not in self._tags and tensor.layout == torch.strided:
                    name, _ = self._rewritten.get(tensor.untyped_storage().data_ptr(), (None, None))
                    self.elsewhere |= {name} if name is not None else set()
        if reached:
            for tensor in tensors_in(result):
                self._reach[tensor] = reached

    def watches(self, name: str, module: nn.Module) -> bool:
        leaf = not list(module.children())
        return leaf or id(module) in self._names or isinstance(module, nn.Embedding) or _passes_on(module)

    def enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if id(module) in self._names:
            self._enter_candidate(module, args, kwargs)
        elif _passes_on(module):
            self._inside.append(None)

    def leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not list(module.children()):
            self._leave_leaf(module, args, output)
        if id(module) in self._names:
            self._leave_candidate(output)
        elif isinstance(module, nn.Embedding):
            for tensor in tensors_in(output):  # ProphetNet's position embeddings give their positions too
                self._reach[tensor] = frozenset([EMBEDDING])
        elif _passes_on(module):
            self._leave_passing(name, module, args, output)

    def _enter_candidate(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        name = self._names[id(module)]
        self._inside.append(name)
        if name not in self.called:
            self.called.append(name)
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor):
            return
        producer = self._maker(x)
        self.producers[name] = self.producers.get(name, "") if producer in (None, "Dropout") else str(producer)
        self.parents.setdefault(name, set()).update(self._reach.get(x, ()))
        tags = self._tags.get(x, frozenset())
        self.feeders.setdefault(name, []).append(tags)
        for tag in tags:
            self.readers.setdefault(tag, set()).add(name)
        if x not in self._read_by:
            self._read_by[x] = set()
            self.siblings.append(self._read_by[x])
        self._read_by[x].add(name)
        self.one_sided[name] = self.one_sided.get(name, True) and bool(x.min() >= 0) if x.numel() else False
        self.shapes.setdefault(name, tuple(x.shape[1:]))

    def _maker(self, x: Tensor) -> str | None:
        return self._made.get((x.data_ptr(), x.shape), (None, x))[0]

    def _leave_leaf(self, module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        kind = type(module).__name__
        if isinstance(module, nn.Dropout) and args and isinstance(args[0], Tensor):
            kind = self._maker(args[0]) or kind  # in eval mode a dropout only passes its input on
        self._made[output.data_ptr(), output.shape] = (kind, output)

    def _leave_candidate(self, output: Any) -> None:
        name = self._inside.pop()
        for tensor in tensors_in(output):
            if name is not None:
                self._reach[tensor] = frozenset([name])
                self._tags.pop(tensor, None)

    def _leave_passing(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self._inside.pop()
        before: frozenset[str] = self._tags.get(args[0], frozenset()) if args else frozenset()
        if not isinstance(output, Tensor):
            self.elsewhere |= before
            return
        passed = frozenset(tag for tag in before if self._commutes(tag, module))
        self.elsewhere |= before - passed
        if type(module) in BYPASSED:
            passed = frozenset([name])
            self._kinds[name] = type(module)
            second, last = (output.shape[index] if output.dim() > 1 else 0 for index in (1, -1))
            self.widths.setdefault(name, set()).add((output.dim(), second, last))
            if getattr(module, "inplace", False):
                self._rewritten[output.untyped_storage().data_ptr()] = (name, output)
        elif type(module) in PAUSED:  # what may not be absorbed across it is still what the next layer reads
            passed = before | ({name} if getattr(module, "p", False) else set())
        self._tags[output] = passed

    def _commutes(self, tag: str, module: nn.Module) -> bool:
        """Whether an activation may come after `module` instead of before it; a dropout's tag goes with the values."""
        kind = self._kinds.get(tag)
        if isinstance(module, _POOLS):
            return kind in (None, nn.ReLU, nn.ReLU6)  # a maximum commutes with what never falls
        return type(module) in PAUSED and kind in (None, nn.ReLU)  # and a factor with what is homogeneous

    def outputs(self, found: list[Tensor]) -> None:
        for tensor in found:
            self.elsewhere |= self._tags.get(tensor, frozenset())

    def ancestors(self) -> dict[str, set[str]]:
        """All candidates (and EMBEDDING) that reach a candidate, by any way."""
        result: dict[str, set[str]] = {}
        for name in self.parents:
            found: set[str] = set()
            todo = list(self.parents[name])
            while todo:
                other = todo.pop()
                if other not in found:
                    found.add(other)
                    todo += self.parents.get(other, ())
            result[name] = found
        return result


def _passes_on(module: nn.Module) -> bool:
    """Whether a module gives what it was given, but for an activation, a dropout's mask or a maximum."""
    return type(module) in (*BYPASSED, *PAUSED, *_POOLS) and "forward" not in module.__dict__


def shortcuts(flow: DataFlow, ancestors: dict[str, set[str]], pointwise: Iterable[str]) -> set[str]:
    """The pointwise convolutions that lead around others: a shortcut's, by structure.

    Such a layer reads what another layer reads too, and its output is added to that of a third which descends from
    the other one.
    """
    found = set()
    candidates = set(pointwise)
    for pair in flow.sums:
        for short, long in (pair, pair[::-1]):
            if len(short) != 1 or not short <= candidates:
                continue
            (name,) = short
            beside = set().union(*(group for group in flow.siblings if name in group)) - {name}
            for end in long - {name, EMBEDDING}:
                if name not in ancestors.get(end, ()) and beside & ancestors.get(end, set()):
                    found.add(name)
    return found

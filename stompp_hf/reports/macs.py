"""Multiply-accumulates of one traced forward pass, by the module that computes them."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .. import kernels
from ..integrations.torch import CPU_ATTENTION, tensors_in
from ..modules import PENDING, Member
from ..modules.torch_encoder import module_by_module
from ..surgery.recorder import Recorder, on_inputs


@dataclass(frozen=True)
class Macs:
    """What `count_macs` found.

    by_module: multiply-accumulates in a module itself, without those of its children, over all its calls, by name;
    inputs: names and shapes of what the model was called with.
    """

    by_module: dict[str, int]
    inputs: str


def _cpu_attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def count_macs(model: nn.Module, example_inputs: Any = None) -> Macs | None:
    """Multiply-accumulates of one forward pass in eval mode; modes, buffers and the random state are put back.

    Counted is what torch's FlopCounterMode counts, two FLOPs each: matrix products, convolutions (by group) and
    attention (the full square of queries and keys, whatever a mask excludes). Norms, activations, softmax and sums are
    not. The number depends on shapes alone, so it is the same in every stage of a model, and on the meta device.

    Args:
        model: any nn.Module, binarized, packed or neither.
        example_inputs: keyword arguments, a tuple of arguments, or one tensor; made from the config if None.

    Returns:
        The counts, or None (with a warning) when no inputs could be made or the model did not run on made-up ones.

    Raises:
        Exception: whatever the model raises on inputs that the caller gave.
    """

    def count(inputs: Any) -> Macs:
        recorder = _MacsRecorder()
        # Compiled kernels are called past torch, which could not count them.
        with _without_values(model), module_by_module(), kernels.switched_off(), recorder.counter:
            recorder.record(model, inputs)
        return Macs(recorder.counts, _shapes(inputs))

    return on_inputs(model, example_inputs, count, "multiply-accumulates", _ADVICE)


class _MacsRecorder(Recorder):
    """What was counted since the last entry or exit belongs to the module that is running."""

    def __init__(self) -> None:
        self.counter = FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: _cpu_attention})
        self.counts: dict[str, int] = {}
        self.running = [""]
        self.seen = 0

    def settle(self) -> None:
        total = self.counter.get_total_flops()
        if total > self.seen:
            self.counts[self.running[-1]] = self.counts.get(self.running[-1], 0) + (total - self.seen) // 2
        self.seen = total

    def enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.settle()
        self.running.append(name)

    def leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.settle()
        self.running.pop()

    def outputs(self, found: Any) -> None:
        self.settle()


@contextlib.contextmanager
def _without_values(model: nn.Module) -> Iterator[None]:
    """Members compute as if nothing was frozen: the same shapes, and no starting values are asked for."""
    found = [m for m in model.modules() if isinstance(m, Member) and not m.is_packed]
    with contextlib.ExitStack() as stack:
        for member in found:
            stack.enter_context(member.values_kept())
            member.enter(PENDING, 0.0)
            member.observer = None
        yield


def _shapes(inputs: Any) -> str:
    items = inputs.items() if hasattr(inputs, "items") else [("", leaf) for leaf in tensors_in(inputs)]
    shapes = [(name, "x".join(map(str, value.shape))) for name, value in items if isinstance(value, torch.Tensor)]
    return ", ".join(f"{name} {shape}".strip() for name, shape in shapes)


_ADVICE = "pass summary(model, example_inputs=...) one small batch to have them counted"

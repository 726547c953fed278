"""Multiply-accumulates of one traced forward pass, by the module that computes them."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .. import kernels
from ..modules import PENDING, Member
from ..modules.packed import PackedMember
from ..modules.torch_encoder import module_by_module
from ..surgery.running import example_inputs_of, run, undisturbed

logger = logging.getLogger(__name__)

_CPU_ATTENTION: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


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
    inputs = example_inputs_of(model) if example_inputs is None else example_inputs
    if inputs is None:
        logger.warning("no multiply-accumulates of %s: %s", type(model).__name__, _ADVICE)
        return None
    counts: dict[str, int] = {}
    running = [""]
    counter = FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: _cpu_attention})
    seen = 0

    def settle() -> None:
        """What was counted since the last entry or exit belongs to the module that is running."""
        nonlocal seen
        total = counter.get_total_flops()
        if total > seen:
            counts[running[-1]] = counts.get(running[-1], 0) + (total - seen) // 2
        seen = total

    def entering(name: str) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            settle()
            running.append(name)

        return enter

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        settle()
        running.pop()

    handles: list[Any] = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(entering(name)))
        handles.append(module.register_forward_hook(leave))
    try:
        # Compiled kernels are called past torch, which could not count them.
        with _without_values(model), module_by_module(), kernels.switched_off(), undisturbed(model), counter:
            run(model, inputs)
            settle()
    except Exception as error:
        if example_inputs is not None:
            raise
        kind = type(model).__name__
        logger.warning("no multiply-accumulates of %s (%s: %s): %s", kind, type(error).__name__, error, _ADVICE)
        return None
    finally:
        for handle in handles:
            handle.remove()
    return Macs(counts, _shapes(inputs))


@contextlib.contextmanager
def _without_values(model: nn.Module) -> Iterator[None]:
    """Members compute as if nothing was frozen: the same shapes, and no starting values are asked for."""
    found = [m for m in model.modules() if isinstance(m, Member) and not isinstance(m, PackedMember)]
    with contextlib.ExitStack() as stack:
        for member in found:
            stack.enter_context(member.values_kept())
            member.enter(PENDING, 0.0)
            member.observer = None
        yield


def _shapes(inputs: Any) -> str:
    items = inputs.items() if hasattr(inputs, "items") else [("", leaf) for leaf in tree_leaves(inputs)]
    shapes = [(name, "x".join(map(str, value.shape))) for name, value in items if isinstance(value, torch.Tensor)]
    return ", ".join(f"{name} {shape}".strip() for name, shape in shapes)


_ADVICE = "pass summary(model, example_inputs=...) one small batch to have them counted"

"""Hold frozen latents against the optimizer, so that sign(latent) is the committed sign and nothing has to be saved."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.sharding import local, part_for
from ..method.mask_bits import unpack_mask
from ..modules import FROZEN, PENDING, BinaryLayer


def parameters_of(optimizer: Any) -> set[int]:
    """What an optimizer may move: the ids of its parameters."""
    return {id(parameter) for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]}


def around_steps(
    optimizer: Any,
    step: Callable[[], int],
    before: Callable[[set[int]], list[Any]],
    after: Callable[[list[Any]], None] = lambda kept: None,
) -> list[Any]:
    """Register step hooks on an optimizer: `after` gets what `before` returned, which is told the optimizer's own.

    A step() that calls its parent's fires its hooks twice: what counts is what stood before the outer one. A step that
    raised is over as soon as `step` gives another number.

    Returns the hooks' handles.
    """
    kept: list[Any] = []
    depth, at = 0, -1

    def enter(*_: Any) -> None:
        nonlocal depth, at
        if step() != at:
            depth, at = 0, step()
        if depth == 0:
            kept[:] = before(parameters_of(optimizer))
        depth += 1

    def leave(*_: Any) -> None:
        nonlocal depth
        depth -= 1
        with torch.no_grad():
            after(kept)
        if depth == 0:
            kept.clear()

    return [optimizer.register_step_pre_hook(enter), optimizer.register_step_post_hook(leave)]


def hold_frozen(optimizer: Any, layers: list[BinaryLayer], step: Callable[[], int]) -> list[Any]:
    """After each step of an optimizer, frozen entries of its weights are what they were before it, to the bit.

    Weights of fully frozen layers lose their gradient before, so that torch's optimizers skip them: no inertia, no
    decay, no state. Others read a missing gradient as zero, or replace the tensor: so these are put back too.
    Cost: for the time of the step, one copy of the weights that have frozen entries; they have no gradient then, whose
    place it takes.

    Returns the hooks' handles.
    """

    def keep(own: set[int]) -> list[Any]:
        kept: list[tuple[BinaryLayer, Tensor, Tensor | None]] = []
        for layer in layers:
            if id(layer.weight) not in own or (state := layer.stage_state) == PENDING:
                continue
            bits = None
            if state == FROZEN:
                layer.weight.grad = None
            elif layer.weight_mask_bits is None:
                continue
            else:
                bits = layer.weight_mask_bits.clone()  # a hook behind the step may go on to the next
            kept.append((layer, local(layer.weight).clone(), bits))
        return kept

    def put_back(kept: list[Any]) -> None:
        for layer, value, bits in kept:
            now = local(layer.weight.data)  # data: the same values are no new version, by which signs are packed anew
            if bits is not None:
                mask = part_for(unpack_mask(bits, layer.weight.shape), layer.weight)
                value = torch.where(mask, value, now)
            now.copy_(value)

    return around_steps(optimizer, step, keep, put_back)


def skip_blocked(optimizer: Any, parameters: Iterable[nn.Parameter], step: Callable[[], int]) -> list[Any]:
    """Register hooks that leave parameters alone which no gradient reached, as in one process.

    Those are what stands before a frozen STE-free layer, and scales of pending layers. DistributedDataParallel without
    find_unused_parameters gives them zeros, with which decay and momentum would go on, and Adam would count steps.

    Returns the hooks' handles.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    reached: set[int] = set()

    def mark(parameter: Tensor) -> None:
        if parameter.grad is not None:  # what the processes add up comes later
            reached.add(id(parameter))

    def skip(own: set[int]) -> list[Any]:
        for parameter in parameters:
            if id(parameter) in own and id(parameter) not in reached:
                parameter.grad = None
        reached.difference_update(own)
        return []

    return [
        *(parameter.register_post_accumulate_grad_hook(mark) for parameter in parameters),
        *around_steps(optimizer, step, skip),
    ]

"""A model's structure: its repeated blocks, and the layers that stay real because of where they stand."""

from typing import Any

from torch import nn

from ..config import StoMPPConfig
from .adapters import adapter_parts
from .dataflow import DataFlow, shortcuts

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
WEIGHTED = (nn.Linear, *CONVOLUTIONS)
_DOWNSAMPLING = ("shortcut", "downsample", "downsampling", "downsampling_layer")


def _weighted(module: nn.Module) -> int:
    added = adapter_parts(module)
    return sum(isinstance(inner, WEIGHTED) and inner not in added for inner in module.modules())


def _repeats(container: nn.Module, block: nn.Module | None) -> bool:
    """Whether a container holds a model's repeated blocks; inside a `block`, whether that is a stage made of them."""
    if not isinstance(container, (nn.ModuleList, nn.Sequential)):
        return False
    if block is None and isinstance(container, nn.ModuleList):
        return True
    items = list(container.children())
    alike = len({type(item) for item in items}) == 1 and all(_weighted(item) > 1 for item in items)
    # A stage holds its blocks, and perhaps a down-sampling layer; a block that holds experts has more beside them.
    return alike and (block is None or _weighted(block) - _weighted(container) <= 1)


def block_of(model: nn.Module, name: str) -> str | None:
    """The repeated block around a layer, or None.

    That is the outermost item of a ModuleList (or of a Sequential of equal items of several layers) on its path; where
    that item is a stage that itself consists of such blocks (ResNet, Swin, ConvNeXt), the block inside it.
    """
    path = name.split(".")
    block: str | None = None
    for depth in range(1, len(path)):
        container = model.get_submodule(".".join(path[:depth]))
        if _repeats(container, None if block is None else model.get_submodule(block)):
            block = ".".join(path[: depth + 1])
    return block


def real_by_place(model: nn.Module, names: list[str], flow: DataFlow | None, config: StoMPPConfig) -> dict[str, str]:
    """The layers that stay real because of where they stand, with the reason: first ones, heads, down-sampling."""
    ancestors = None if flow is None else flow.ancestors()
    blocks = {name for name in names if block_of(model, name) is not None}
    if ancestors is None:
        reasons = _by_registration(names, blocks, config)
    else:
        reasons = _by_flow(names, blocks, ancestors, config)
    if config.downsampling == "keep":
        reasons |= _downsampling(model, names, flow, ancestors or {})
    return reasons


def _by_registration(names: list[str], blocks: set[str], config: StoMPPConfig) -> dict[str, str]:
    """Without a probe: what is registered before the first block or after the last, or first or last of all."""
    inner = [index for index, name in enumerate(names) if name in blocks] or range(1, len(names) - 1)
    reasons: dict[str, str] = {}
    for index, name in enumerate(names):
        before, after = index < min(inner, default=1), index > max(inner, default=len(names) - 2)
        if reason := _reason(before, after, bool(blocks), config):
            reasons[name] = reason
    return reasons


def _by_flow(
    names: list[str], blocks: set[str], ancestors: dict[str, set[str]], config: StoMPPConfig
) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for name in names:
        above = ancestors[name] - {name}
        below = {other for other in names if name in ancestors[other]} - {name}
        if name in blocks:
            if not above and config.first_layer == "keep":
                reasons[name] = "first layer: it reads the model's input"
            continue
        before, after = not above & blocks if blocks else not above, not (below & blocks if blocks else below)
        if reason := _reason(before, after, bool(blocks), config):
            reasons[name] = reason
    return reasons


def _reason(before: bool, after: bool, blocks: bool, config: StoMPPConfig) -> str | None:
    if before and config.first_layer == "keep":
        return "first layer" + (": it runs before the first repeated block" if blocks else " of a model without blocks")
    if after and config.head == "keep":
        return "head" + (
            ": it runs after the last repeated block" if blocks else ": last layer of a model without blocks"
        )
    return None


def _downsampling(
    model: nn.Module, names: list[str], flow: DataFlow | None, ancestors: dict[str, set[str]]
) -> dict[str, str]:
    reasons = {}
    for name in names:
        if any(part in _DOWNSAMPLING for part in name.split(".")):
            reasons[name] = "down-sampling or shortcut layer, by its name"
    if flow is not None:
        pointwise = [name for name in names if _is_pointwise(model.get_submodule(name))]
        for name in shortcuts(flow, ancestors, pointwise):
            reasons.setdefault(name, "shortcut: it leads around other layers")
    return reasons


def _is_pointwise(module: Any) -> bool:
    return isinstance(module, CONVOLUTIONS) and set(module.kernel_size) == {1}

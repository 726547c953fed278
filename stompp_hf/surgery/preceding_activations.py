"""What happens to the activations and dropouts that stand right before binary layers."""

from dataclasses import dataclass, field

from torch import nn

from ..config import StoMPPConfig
from ..modules.activations import ABSORBABLE, ABSORBED, BYPASSED, DROPPABLE, DROPPED, PAUSED, REPLACEMENT
from .blocks import CONVOLUTIONS
from .dataflow import DataFlow


@dataclass
class Neighbours:
    """Which layers absorb which activation, and what becomes of the modules in front of them, by name.

    one_signed: layers whose input has one sign in the end; ungated: layers whose activation was dropped.
    """

    absorbing: dict[str, str] = field(default_factory=dict)
    bypassed: dict[str, str] = field(default_factory=dict)
    shifted: dict[str, list[str]] = field(default_factory=dict)
    paused: dict[str, list[str]] = field(default_factory=dict)
    one_signed: list[str] = field(default_factory=list)
    ungated: set[str] = field(default_factory=set)


def neighbours(model: nn.Module, names: list[str], flow: DataFlow, config: StoMPPConfig) -> Neighbours:
    """Decide, from the probe, what becomes of the activations and dropouts that feed the layers `names`.

    relu="absorb": an activation that only binary layers read is computed by them instead, so that their sign is that
    of the value before it. relu="drop": an activation that any binary layer reads goes. relu="rprelu": a ReLU that any
    binary layer reads becomes an RPReLU. relu="keep": nothing. gelu="relu": a GELU, SiLU or Mish that any binary layer
    reads counts as a ReLU in this, and becomes one where it is not absorbed.
    A dropout that feeds a binary layer is paused from the moment at which that layer has frozen entries.
    """
    result = Neighbours()
    if not config.binary_activations:
        return result
    binary = set(names)
    kinds = {tag: type(model.get_submodule(tag)) for tag in flow.readers}
    result.paused = {
        tag: sorted(readers & binary)
        for tag, readers in flow.readers.items()
        if kinds[tag] in PAUSED and readers & binary
    }
    activations = {tag: readers for tag, readers in flow.readers.items() if kinds[tag] in BYPASSED}
    if config.gelu == "relu":
        result.bypassed = {
            tag: REPLACEMENT for tag, readers in activations.items() if kinds[tag] in DROPPABLE and readers & binary
        }
        kinds |= dict.fromkeys(result.bypassed, nn.ReLU)
    if config.relu == "drop":
        result.bypassed = {tag: DROPPED for tag, readers in activations.items() if readers & binary}
        result.ungated = {reader for tag in result.bypassed for reader in activations[tag] & binary}
    elif config.relu == "rprelu":
        shifts = {tag: sorted(readers & binary) for tag, readers in activations.items() if kinds[tag] is nn.ReLU}
        result.shifted = {tag: readers for tag, readers in shifts.items() if readers and _one_width(model, tag, flow)}
    elif config.relu == "absorb":
        activations = {tag: readers for tag, readers in activations.items() if kinds[tag].__name__ in ABSORBABLE}
        chosen = _absorbable(activations, kinds, binary, flow)
        result.bypassed |= {tag: ABSORBED for tag in activations if tag in chosen}
        result.absorbing = {reader: kinds[tag].__name__ for tag in chosen for reader in activations[tag]}
    replaced = {tag for tag, how in result.bypassed.items() if how == REPLACEMENT}
    gone = result.bypassed.keys() - replaced
    result.one_signed = [
        name
        for name in names
        if (flow.one_sided.get(name) or all(tags & replaced for tags in flow.feeders.get(name, [frozenset()])))
        and not any(tags & gone for tags in flow.feeders[name])
    ]
    return result


def _one_width(model: nn.Module, tag: str, flow: DataFlow) -> bool:
    """Whether an activation always has the same channels, in the same dimension, so that it can have shifts."""
    convolutions = {isinstance(model.get_submodule(reader), CONVOLUTIONS) for reader in flow.readers[tag]}
    widths = {(dims, second if convolutions == {True} else last) for dims, second, last in flow.widths[tag]}
    return len(convolutions) == len(widths) == 1


def _absorbable(activations: dict[str, set[str]], kinds: dict[str, type], binary: set[str], flow: DataFlow) -> set[str]:
    """Activations that nothing but binary layers reads, every one of which gets one kind of activation, always."""
    chosen = {tag for tag, readers in activations.items() if readers <= binary and tag not in flow.elsewhere}
    while True:
        fit = {
            reader
            for reader in set().union(*(activations[tag] for tag in chosen))
            if all(tags & chosen for tags in flow.feeders[reader])
            and len({kinds[tag] for tags in flow.feeders[reader] for tag in tags & chosen}) == 1
        }
        kept = {tag for tag in chosen if activations[tag] <= fit}
        if kept == chosen:
            return chosen
        chosen = kept

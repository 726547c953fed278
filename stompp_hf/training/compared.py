"""Where a student is compared with its teacher: what its blocks give, what enters the first, and their q, k and v."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import DistillationError

PROJECTIONS = (
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("linear_q", "linear_k", "linear_v"),
)
"""Names of the three projections of one attention module, in the order query, key, value."""

FUSED = ("c_attn", "qkv", "Wqkv")
"""Names of layers that give query, key and value side by side, a third each."""

_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
_KEY_HEADS = ("num_key_value_heads", *_HEADS)


@dataclass
class Place:
    """A module, and which tensor of its call is compared: read(args, kwargs, output).

    name: what it is called in errors; heads: how many relation heads the tensor has.
    """

    name: str
    module: nn.Module
    read: Callable[[Any, Any, Any], Any]
    heads: int = 1


def _output(args: Any, kwargs: Any, output: Any) -> Any:
    return output if isinstance(output, Tensor) else output[0]


def _input(args: Any, kwargs: Any, output: Any) -> Any:
    return args[0] if args else next((value for value in kwargs.values() if isinstance(value, Tensor)), None)


def _third(number: int, args: Any, kwargs: Any, output: Any) -> Any:
    return output.chunk(3, -1)[number]


def hidden_places(model: nn.Module, blocks: list[str]) -> dict[str, Place]:
    """The outputs of blocks, by the number of the block."""
    return {str(n): Place(name, model.get_submodule(name), _output) for n, name in enumerate(blocks)}


def embedding_places(model: nn.Module, firsts: list[str]) -> dict[str, Place]:
    """What enters the first block of each chain of blocks: the embeddings, with all that is added to them."""
    return {f"input {n}": Place(name, model.get_submodule(name), _input) for n, name in enumerate(firsts)}


def relation_places(model: nn.Module, blocks: list[str]) -> dict[str, Place]:
    """The queries, keys and values of every attention module in blocks; blocks without attention have none.

    Raises:
        DistillationError: no projections are found in a block with attention, or in any block, or their heads.
    """
    found: dict[str, Place] = {}
    for number, name in enumerate(blocks):
        block = model.get_submodule(name)
        own = {
            f"{number} {inside} {site}".replace("  ", " "): place
            for inside, module in block.named_modules()
            for site, place in _projections(model, module, f"{name}.{inside}".rstrip("."))
        }
        if not own and any("attention" in type(module).__name__.lower() for module in block.modules()):
            raise _unknown(name)
        found |= own
    if not found:
        raise _unknown(", ".join(blocks[:3]))
    return found


def _unknown(name: str) -> DistillationError:
    known = ", ".join("/".join(names) for names in PROJECTIONS)
    return DistillationError(
        f"relations: {name} has no query, key and value projections of a known name ({known}), nor one layer that "
        f"gives all three, a third each ({', '.join(FUSED)}); use relations=0."
    )


def _projections(model: Any, module: Any, name: str) -> list[tuple[str, Place]]:
    """Query, key and value of one attention module, if it is one."""
    children = dict(module.named_children())
    sites = ("query", "key", "value")
    heads = [_heads(model, module, names) for names in (_HEADS, _KEY_HEADS, _KEY_HEADS)]
    places: list[Place] = []
    for names in PROJECTIONS:
        if all(other in children for other in names):
            places = [Place(f"{name}.{n}", children[n], _output, h) for n, h in zip(names, heads, strict=True)]
    for fused in FUSED:
        weight = getattr(children.get(fused), "weight", None)
        if weight is not None and 3 * min(weight.shape) == max(weight.shape):  # cross-attention's has two parts
            places = [Place(f"{name}.{fused}", children[fused], partial(_third, n), heads[0]) for n in range(3)]
    if any(place.heads == 0 for place in places):
        raise DistillationError(
            f"relations: neither {name} nor its config says how many heads it has ({', '.join(_HEADS)}); use "
            "relations=0."
        )
    return list(zip(sites, places, strict=True)) if places else []


def _heads(model: Any, module: Any, names: tuple[str, ...]) -> int:
    """The first number that the attention module, its config or the model's has under one of some names."""
    for holder in (module, getattr(module, "config", None), getattr(model, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return 0

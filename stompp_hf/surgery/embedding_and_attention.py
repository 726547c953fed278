"""What becomes binary beyond the layers, where it is asked for: the word embedding and the products of attention."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import StoMPPConfig
from ..errors import ConfigError
from ..integrations.torch import parameters_of
from ..modules.attention import Call, grouped, probabilities, scaling_of, scores_of
from ..modules.embedding import BinaryEmbedding
from .attention_interface import CHILD, NAMES, configs_of, implementations, watched
from .recorder import Recorder, same, tensors_of
from .running import example_inputs_of, run, undisturbed

Excluded = Callable[[str], str | None]
"""Says of a name why it stays real, or None."""


@dataclass
class Beyond:
    """Names of what becomes binary beyond the layers, and why the rest does not.

    attention: shapes of attention entries, by name; embedding: the word embedding's name; called: the names of layers
    and attention entries in the order of their first call, where attention was looked at; implementation: what the
    attention modules use now.
    """

    attention: dict[str, list[int]] = field(default_factory=dict)
    embedding: str | None = None
    called: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    implementation: str | None = None


# ---- the word embedding ----


def word_embedding(model: nn.Module) -> nn.Module | None:
    """The module that a model names as its input embedding, if it does."""
    try:
        return model.get_input_embeddings()  # type: ignore[operator,no-any-return]
    except (AttributeError, NotImplementedError):
        return None


def find_embedding(model: nn.Module, beyond: Beyond, excluded: Excluded) -> None:
    """Note the model's word embedding, or why there is none to binarize."""
    module = word_embedding(model)
    name = next((name for name, other in model.named_modules() if other is module), None)
    if module is None or name is None:
        beyond.left["embeddings"] = f"{type(model).__name__} names no input embedding (get_input_embeddings())"
        return
    reason = excluded(name) or BinaryEmbedding.unfit(module)
    if reason is None:
        weights = {other: parameters_of(m).get("weight") for other, m in model.named_modules() if m is not module}
        tied = [other for other, weight in weights.items() if weight is parameters_of(module)["weight"]]
        reason = f"its weight is tied to {', '.join(tied)}" if tied else None
    if reason is None:
        beyond.embedding = name
    else:
        beyond.left[name] = reason


# ---- the products of attention ----


class _Calls(Recorder):
    """The layers in the order of their first call, and the modules called attention that ran."""

    def __init__(self, layers: list[str]) -> None:
        self.layers = layers
        self.order: dict[str, None] = {}
        self.ran: set[str] = set()

    def watches(self, name: str, module: nn.Module) -> bool:
        return name in self.layers or "attention" in type(module).__name__.lower()

    def enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        (self.order.setdefault(name) if name in self.layers else self.ran.add(name))


def find_attention(
    model: nn.Module, layers: list[str], beyond: Beyond, excluded: Excluded, example_inputs: Any = None
) -> None:
    """Note the attention modules that go through the interface, in execution order.

    Args:
        model: the unconverted model.
        layers: names of the layers to order them among.
        excluded: says of an entry's name why it stays real, or None.
        example_inputs: as for `probe`.

    Raises:
        ConfigError: no probe can be run, an implementation has no binary form, or a module that is not excluded
            computes attention in another way.
    """
    _check_implementations(model)
    inputs, plain = _first_run(model, example_inputs)
    names = {id(module): name for name, module in model.named_modules()}
    shapes: dict[str, list[int]] = {}
    unlike: set[str] = set()
    calls = _Calls(layers)

    def note(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, call: Call) -> None:
        name = f"{names[id(module)]}.{CHILD}"
        calls.order.setdefault(name)
        shapes.setdefault(name, [query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]])
        if not _is_softmax_attention(query, key, value, call):
            unlike.add(name)

    with watched(model, note):
        renamed = tensors_of(calls.record(model, inputs))

    dispatched = [name.removesuffix(f".{CHILD}") for name in shapes]
    others = [f"{name}.{CHILD}" for name in _otherwise(sorted(calls.ran), dispatched)]
    reasons = {name: excluded(name) for name in (*shapes, *others)}
    beyond.left.update({name: reason for name, reason in reasons.items() if reason})
    wrong = {name: "it computes attention itself" for name in others if not reasons[name]}
    wrong |= {n: "it is not softmax(q k^T + mask) v" for n in shapes if n in unlike and not reasons[n]}
    if not wrong and not same(plain, renamed):
        wrong = dict.fromkeys(shapes, "what it computes depends on the name of its attention implementation")
    if not wrong and not reasons:
        wrong = {type(model).__name__: "it has no attention that goes through the interface"}
    if wrong:
        listed = "; ".join(f"{name.removesuffix(f'.{CHILD}')} ({why})" for name, why in list(wrong.items())[:6])
        raise ConfigError(
            f"StoMPPConfig: attention='binarize' needs attention through transformers' AttentionInterface, and "
            f"{len(wrong)} module{'s' if len(wrong) > 1 else ''} cannot have it: {listed}. Use attention='keep', or "
            "exclude_modules=[...] to leave these real."
        )
    beyond.attention = {name: shape for name, shape in shapes.items() if not reasons[name]}
    beyond.called = list(calls.order)
    if beyond.attention:
        (beyond.implementation,) = implementations(model)


def _first_run(model: nn.Module, example_inputs: Any) -> tuple[Any, list[Tensor]]:
    """Inputs that the model runs on, and what it makes of them before anything is changed."""
    inputs = example_inputs_of(model) if example_inputs is None else example_inputs
    failure: Exception | None = None
    if inputs is not None:
        try:
            with undisturbed(model):
                return inputs, tensors_of(run(model, inputs))
        except Exception as error:
            if example_inputs is not None:
                raise
            failure = error
    raise ConfigError(
        "StoMPPConfig: attention='binarize' needs one run of the model to find its attention modules, and no inputs "
        "that it runs on could be made from its config; pass binarize_model(model, config, example_inputs=...) one "
        "small batch."
    ) from failure


def _check_implementations(model: nn.Module) -> None:
    found = implementations(model)
    unknown = sorted(found - set(NAMES))
    if unknown or len(found) != 1:
        raise ConfigError(
            f"StoMPPConfig: attention='binarize' works in place of {' or '.join(NAMES)}, the same in all parts of a "
            f"model, and this one uses {', '.join(sorted(found)) or 'none'}. Load it with attn_implementation='sdpa'."
        )
    if any(getattr(config, "output_attentions", False) for config in configs_of(model)):
        raise ConfigError(
            "StoMPPConfig: attention='binarize' does not go with config.output_attentions=True, which transformers "
            "allows for eager attention only. Set it to False, and pass output_attentions=True when calling the model."
        )


def _otherwise(ran: list[str], dispatched: list[str]) -> list[str]:
    """Modules called attention that ran without going through the interface, themselves or by a part of them."""

    def related(name: str) -> bool:
        return any(f"{other}.".startswith(f"{name}.") or f"{name}.".startswith(f"{other}.") for other in dispatched)

    own = [name for name in ran if not related(name)]
    return [name for name in own if not any(other.startswith(f"{name}.") for other in own)]


LARGE = 100.0
"""Of scores at which an attention is looked at as well: whatever bends them is seen there."""


def _is_softmax_attention(query: Tensor, key: Tensor, value: Tensor, call: Call) -> bool:
    """Whether the original implementation computes what `BinaryAttention` is a binary form of."""
    heads = key.shape[1]
    if query.shape[1] % heads or value.shape[1] != heads:
        return False
    if not _agrees(query, key, value, call):
        return False
    if torch.finfo(query.dtype).bits < 32:
        return True  # its rounding alone would show at large scores
    largest = scaling_of(query, call) * query.detach().norm(dim=-1).max() * key.detach().norm(dim=-1).max()
    return not largest > 0 or _agrees(query * (LARGE / largest), key, value, call)


def _agrees(query: Tensor, key: Tensor, value: Tensor, call: Call) -> bool:
    q, k, v = (grouped(u, key.shape[1]).double() for u in (query, key, value))
    p, excluded = probabilities(scores_of(q.matmul(k.transpose(-1, -2)), query, call), call)
    own, (theirs, _) = p.matmul(v).flatten(1, 2).transpose(1, 2), call.plain(query, key, value)
    if own.shape != theirs.shape:
        return False
    if excluded is not None:  # what a query gets that may look at nothing has no meaning
        blind = torch.zeros_like(p[..., 0], dtype=torch.bool) | excluded.all(-1)
        blind = blind.flatten(1, 2).transpose(1, 2)[..., None]
        own, theirs = own.masked_fill(blind, 0.0), theirs.masked_fill(blind, 0.0)
    return bool((own - theirs).abs().max() <= 1e-2 * theirs.abs().max())


def find(
    model: nn.Module, config: StoMPPConfig, layers: list[str], excluded: Excluded, example_inputs: Any = None
) -> Beyond:
    """What the configuration asks for beyond the layers, if it asks; raises as `find_attention` does."""
    beyond = Beyond()
    if config.embeddings == "binarize":
        find_embedding(model, beyond, excluded)
    if config.attention == "binarize":
        find_attention(model, layers, beyond, excluded, example_inputs)
    return beyond

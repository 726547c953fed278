"""summary: what of a model is 1-bit, what that saves in bytes and multiply-accumulates, and what stayed real and why.

`report` tells what surgery decided and needs no forward pass; this tells what it amounts to, at any time of a run.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import nn

from ..errors import ConfigError, NotBinarizedError
from ..integrations.torch import parameters_of
from ..modules import FROZEN, Member
from ..surgery.blocks import block_of
from ..surgery.embedding_and_attention import word_embedding
from ..surgery.members import get_plan, planned_model
from ..surgery.plan import Plan
from .macs import Macs, count_macs
from .sizes import Size, sizes
from .summary_table import as_markdown, as_rich, as_text

REAL, PACKED, MIXED = "real", "packed", "mixed"


@dataclass
class Row:
    """One module without its children, or one block with all that is in it.

    kind: the class of the plain module; shape: of its weight as it is trained, None for a block and without a weight
    (of attention products: heads, key heads, head size, value size); weight_bits, activation_bits: bits of a weight's
    entry, and of an entry of what the product reads, each of them once where a block holds several, none where there
    is no such operand; parameters: of the plain model; binary: how many of them are, or will be, signs; stored,
    packed, float32: bytes as saved now, after `pack_model`, and of the plain model in float32; macs_1bit: products of
    two 1-bit operands; macs_real: all others, those of a 1-bit weight and a real activation too; macs_final: those
    that are 1-bit once everything is frozen (all None: not counted); stages: numbers from 1; state: "pending",
    "transition", "frozen", "packed", "real", or "mixed"; frozen: share of binary entries that are frozen, from 0 to 1,
    None where nothing ever is; reason: why a module is real.
    """

    name: str
    kind: str
    shape: list[int] | None
    weight_bits: list[int]
    activation_bits: list[int]
    parameters: int
    binary: int
    stored: int
    packed: int
    float32: int
    macs_1bit: int | None
    macs_real: int | None
    macs_final: int | None
    stages: list[int]
    state: str
    frozen: float | None
    reason: str | None = None


@dataclass
class Totals:
    """Sums over all rows, and their ratios.

    compression: bytes of the plain model in float32 over bytes as stored now, and packed_compression: over those after
    `pack_model`; share_1bit: of all multiply-accumulates, now, and share_final: once everything is frozen; frozen:
    share of the binary weights' entries that are frozen. None: not counted, or nothing to divide by.
    """

    parameters: int
    binary: int
    stored: int
    packed: int
    float32: int
    macs_1bit: int | None
    macs_real: int | None
    macs_final: int | None
    frozen: float | None

    @property
    def macs(self) -> int | None:
        """All multiply-accumulates."""
        return None if self.macs_1bit is None or self.macs_real is None else self.macs_1bit + self.macs_real

    @property
    def ratios(self) -> dict[str, float | None]:
        """What is derived, by name."""
        return {
            "compression": _ratio(self.float32, self.stored),
            "packed_compression": _ratio(self.float32, self.packed),
            "share_1bit": _ratio(self.macs_1bit, self.macs),
            "share_final": _ratio(self.macs_final, self.macs),
        }


@dataclass
class Summary:
    """What `summary` found. `print` it, `show` it in colours, or take it as Markdown or as plain values.

    inputs: what the multiply-accumulates were counted for, None where they were not; left: why things are real that no
    row stands for.
    """

    model: str
    depth: str
    inputs: str | None
    rows: list[Row]
    modules: list[Row]
    totals: Totals
    left: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; "totals" holds the ratios too, and "real" what was left real and why."""
        totals = {**asdict(self.totals), "macs": self.totals.macs, **self.totals.ratios}
        rows = [asdict(row) for row in self.rows]
        return {
            "model": self.model,
            "depth": self.depth,
            "inputs": self.inputs,
            "rows": rows,
            "totals": totals,
            "real": [asdict(real) for real in self.real()],
        }

    def real(self) -> list["Real"]:
        """What stayed real and why, modules of one class and one reason together."""
        found: dict[tuple[str, str], Real] = {}
        for row in self.modules:
            if row.reason is not None:
                real = found.setdefault((row.kind, row.reason), Real(row.kind, row.reason))
                real.names.append(row.name)
                real.parameters += row.parameters
                real.macs += row.macs_real or 0
        return [*found.values(), *(Real("", reason, [name]) for name, reason in self.left.items())]

    def to_markdown(self) -> str:
        """A table, what it adds up to, and what stayed real."""
        return as_markdown(self)

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> Any:
        return as_rich(self)

    def show(self) -> None:
        """Print it, as a table of rich where that is installed (pip install "stompp-hf[rich]"), else as plain text."""
        try:
            from rich.console import Console
        except ImportError:
            print(self, '\n(pip install "stompp-hf[rich]" prints this as a table in colours)')
            return
        Console().print(self)


@dataclass
class Real:
    """Modules of one class that are real for one reason; parameters and multiply-accumulates of all of them."""

    kind: str
    reason: str
    names: list[str] = field(default_factory=list)
    parameters: int = 0
    macs: int = 0


def summary(model: nn.Module, example_inputs: Any = None, *, depth: Literal["block", "module"] = "block") -> Summary:
    """What of a model is 1-bit, by block or by module: bits, parameters, bytes, multiply-accumulates, stage and state.

    For plain, binarized (at any step of a run) and packed models; nothing is changed. A layer is 1-bit from the moment
    it is frozen, since a layer in transition holds real entries; its share is in `frozen`. Bytes are those of
    `save_pretrained`'s tensors in float32 or whatever the model is in. Multiply-accumulates come from one traced
    forward pass (see `count_macs`), for `inputs` as given and not for one example.

    Args:
        model: any nn.Module, or a wrapper of one.
        example_inputs: keyword arguments, a tuple of arguments, or one tensor, for the forward pass; made from a
            transformers model's config if None. Without either, multiply-accumulates are None, with a warning.
        depth: "block": what is in a repeated block is one row; "module": each module with tensors or products.

    Raises:
        ConfigError: `depth` is none of these.
        Exception: whatever the model raises on inputs that the caller gave.

    Source: the columns are those of larq's summary; what counts as 1-bit, and the rest, is this library's choice.
    """
    if depth not in ("block", "module"):
        raise ConfigError(f"summary: depth={depth!r} must be 'block' or 'module'.")
    root, plan = _root(model)
    macs, size = count_macs(root, example_inputs), sizes(root)
    counted = {} if macs is None else macs.by_module
    names = [name for name, _ in root.named_modules() if name in size or name in counted]
    modules = [_row(root, plan, name, size.get(name, Size()), macs) for name in names]
    rows = modules if depth == "module" else _blocks(root, modules)
    left = {name: reason for name, reason in (plan.left if plan else {}).items() if name not in names}
    whole = _merged("", "", modules)
    totals = Totals(**{f: getattr(whole, f) for f in Totals.__dataclass_fields__})
    return Summary(type(root).__name__, depth, None if macs is None else macs.inputs, rows, modules, totals, left)


def _root(model: nn.Module) -> tuple[nn.Module, Plan | None]:
    try:
        return planned_model(model), get_plan(model)
    except NotBinarizedError:
        return model, None


def _row(root: nn.Module, plan: Plan | None, name: str, size: Size, macs: Macs | None) -> Row:
    module: Any = root.get_submodule(name)
    entry = next((entry for entry in plan.entries if entry.name == name), None) if plan is not None else None
    member = module if isinstance(module, Member) else None
    weight_bits, activation_bits = _real_bits(root, module) if member is None else member.bits()
    final_1bit = member is not None and member.ends_in_1bit_products
    products = None if macs is None else macs.by_module.get(name, 0)
    are_1bit = final_1bit and module.stage_state == FROZEN
    kind, state, frozen = type(module).__name__, REAL, None
    shape = getattr(module, "weight_shape", None) or getattr(parameters_of(module).get("weight"), "shape", None)
    if member is not None:
        kind, frozen = member.plain_kind, member.frozen_share
        state = PACKED if member.is_packed else REAL if member.always_real else member.stage_state
    return Row(
        name=name,
        kind=kind,
        shape=list(shape) if shape is not None else entry.shape if entry is not None else None,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        **asdict(size),
        macs_1bit=None if products is None else products * are_1bit,
        macs_real=None if products is None else products * (not are_1bit),
        macs_final=None if products is None else products * final_1bit,
        stages=[] if entry is None else [entry.stage + 1],
        state=state,
        frozen=frozen,
        reason=None if plan is None or entry is not None else _why(root, plan, name),
    )


def _real_bits(root: nn.Module, module: Any) -> tuple[list[int], list[int]]:
    """Bits of an entry of a real module's weight, and of what it reads."""
    own = [p for p in (*parameters_of(module).values(), *root.parameters()) if p is not None and p.is_floating_point()]
    real = 8 * own[0].element_size() if own else 32
    weight: Any = parameters_of(module).get("weight")
    product = weight is not None and weight.dim() > 1
    reads = [] if isinstance(module, nn.Embedding) or (weight is not None and not product) else [real]
    return ([8 * weight.element_size()] if product else []), reads


def _why(root: nn.Module, plan: Plan, name: str) -> str:
    module, config = root.get_submodule(name), plan.config
    if name in plan.left:
        return plan.left[name]
    if isinstance(module, nn.Embedding):
        words = module is word_embedding(root)
        return f"embeddings={config.embeddings!r}" if words else "an embedding other than that of words"
    if not list(module.parameters(recurse=False)):
        return f"products of activations (attention={config.attention!r})"
    return "its class has no binary form"


def _blocks(root: nn.Module, modules: list[Row]) -> list[Row]:
    """The rows of each repeated block as one, where its first one was."""
    groups: dict[str, list[Row]] = {}
    for row in modules:
        groups.setdefault(block_of(root, row.name) or row.name, []).append(row)
    return [
        inside[0]
        if [row.name for row in inside] == [name]
        else _merged(name, type(root.get_submodule(name)).__name__, inside)
        for name, inside in groups.items()
    ]


def _merged(name: str, kind: str, rows: list[Row]) -> Row:
    def total(column: str) -> Any:
        values = [getattr(row, column) for row in rows]
        return None if None in values else sum(values)

    def all_of(column: str) -> list[int]:
        return sorted({value for row in rows for value in getattr(row, column)})

    members = [row for row in rows if row.frozen is not None]
    weighted = [row for row in members if row.binary] or members
    weights = sum(row.binary or 1 for row in weighted)
    states = {row.state for row in members} or {REAL}
    columns = ("parameters", "binary", "stored", "packed", "float32", "macs_1bit", "macs_real", "macs_final")
    return Row(
        name=name,
        kind=kind,
        shape=None,
        weight_bits=all_of("weight_bits"),
        activation_bits=all_of("activation_bits"),
        **{column: total(column) for column in columns},
        stages=all_of("stages"),
        state=states.pop() if len(states) == 1 else MIXED,
        frozen=sum((row.frozen or 0.0) * (row.binary or 1) for row in weighted) / weights if weighted else None,
    )


def _ratio(part: int | None, whole: int | None) -> float | None:
    return None if part is None or not whole else part / whole

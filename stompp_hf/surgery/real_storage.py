"""How what stays real is stored in a packed checkpoint: float32, half precision, or embedding tables in int8.

In memory a model computes in the dtype that it is loaded with. Values are rounded when it is packed, so that what was
packed, what is saved and what is loaded again are the same numbers; a hook on `state_dict` writes them narrow.
"""

import logging
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PackingError
from ..integrations.torch import remove_state_dict_hook
from ..modules import BinaryEmbedding
from ..modules.int8_embedding import Int8Embedding
from .members import get_plan, own_tensors
from .plan import FLOAT32, INT8, Plan

logger = logging.getLogger(__name__)

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, INT8: torch.float16}
"""Dtype of the real parameters in the file; with int8, of those that are no table of their own."""


def real_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are stored as `real` says, by name: all but scales, thresholds, shifts and latents."""
    own = {id(tensor) for tensor in own_tensors(model)}
    named = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in named if id(p) not in own and p.is_floating_point()}


def check_real(model: nn.Module, real: str) -> None:
    """Whether a model's real parameters can be stored so.

    Raises:
        PackingError: `real` is none of the choices, or a value is too large for float16.
    """
    if real not in (FLOAT32, *DTYPES):
        raise PackingError(f"pack_model: real={real!r} is not one of {', '.join(map(repr, (FLOAT32, *DTYPES)))}.")
    if real == FLOAT32:
        return
    tables = {f"{name}.weight" for name in int8_tables(model, real)}
    for name, parameter in real_parameters(model).items():
        largest = float(parameter.detach().abs().max()) if parameter.numel() else 0.0
        if name not in tables and not largest <= torch.finfo(DTYPES[real]).max:
            raise PackingError(
                f"pack_model: {name} holds {largest:g}, and {DTYPES[real]} ends at {torch.finfo(DTYPES[real]).max:g}; "
                "use pack_model(model, real='bfloat16') or 'float32'."
            )


def int8_tables(model: nn.Module, real: str) -> list[str]:
    """The embedding tables that are stored in int8: those whose weight nothing else uses."""
    if real != INT8:
        return []
    used = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    tables = {name: table for name, table in model.named_modules() if BinaryEmbedding.unfit(table) is None}
    return [name for name, table in tables.items() if used[id(table.weight)] == 1]


def store_real(model: nn.Module, plan: Plan, real: str) -> None:
    """Round a model's real parameters to what `real` stores, in place, and note it in the plan."""
    plan.real, plan.int8 = real, int8_tables(model, real)
    rest = [name for name, module in model.named_modules() if type(module) is nn.Embedding and name not in plan.int8]
    if real == INT8 and rest:
        logger.warning("real='int8': stored as float16, since something else uses the weight: %s.", ", ".join(rest))
    narrow_tables(model, plan)
    if real != FLOAT32:
        for parameter in {id(p): p for p in real_parameters(model).values()}.values():
            parameter.data = parameter.data.to(DTYPES[real]).to(parameter.dtype)
    write_narrow(model, plan)


def narrow_tables(model: nn.Module, plan: Plan) -> None:
    """Turn the tables that a plan names into int8 ones, also on the meta device."""
    for name in plan.int8:
        table: Any = model.get_submodule(name)
        reason = BinaryEmbedding.unfit(table)
        if reason is not None:
            raise PackingError(f"{name} cannot be stored in int8: {reason}.")
        Int8Embedding.convert(table)


def write_narrow(model: nn.Module, plan: Plan) -> None:
    """From here on state dicts of the model hold its real parameters in the plan's dtype."""
    remove_state_dict_hook(model, _narrowed)
    if plan.real != FLOAT32:
        model.register_state_dict_post_hook(_narrowed)


def widen(model: nn.Module, plan: Plan) -> None:
    """Undo `store_real`, in place; what rounding took is gone."""
    for name in plan.int8:
        table: Any = model.get_submodule(name)
        if isinstance(table, Int8Embedding):
            table.restore()
    plan.real, plan.int8 = FLOAT32, []
    write_narrow(model, plan)


def _narrowed(model: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    dtype = DTYPES[get_plan(model).real]
    done: dict[int, Tensor] = {}  # tied weights stay one tensor
    for name, parameter in real_parameters(model).items():
        held = state_dict.get(prefix + name)
        if held is None or isinstance(held, nn.Parameter) or held.dtype not in (torch.float32, torch.float64):
            continue  # left out, asked for as it is (keep_vars=True), or narrow already
        state_dict[prefix + name] = done.setdefault(id(parameter), held.to(dtype))

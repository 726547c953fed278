"""pack_model and unpack_model: from latent weights to 8 signs a byte and back, in place, all of them or none."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import NonFiniteError, NotCalibratedError, PackingError
from ..integrations.sharding import GATHER, refuse_sharded
from ..modules import Member
from ..modules.packed import PACKED_CLASSES, PackedMember
from ..modules.stage_member import write_states
from ..surgery.binarize import cast_to_float32
from ..surgery.members import get_plan, members, planned_models
from ..surgery.ownership import record
from ..surgery.plan import FLOAT32, Plan
from ..surgery.real_storage import check_real, store_real, widen
from ..surgery.unfusing import unfuse

Model = TypeVar("Model", bound=nn.Module)


def pack_model(model: Model, *, commit: bool = False, real: str = FLOAT32) -> Model:
    """Replace the latent weights of a frozen model by their signs, 8 a byte, in place, and return the same model.

    Forward: bitwise what the frozen model computes in float32, unless `real` rounds what stays real. `save_pretrained`
    then writes the packed format, which `from_pretrained` reads after `import stompp_hf`. Scales, thresholds, biases
    and what is real stay parameters; the latents are gone, and `unpack_model` makes new ones from scales and signs.

    Args:
        model: a binarized model, or a wrapper of one, with every stage frozen.
        commit: freeze what is not frozen yet, here and now, as if the run had ended. Activation values must be there.
        real: how what stays real (embeddings, heads, norms, biases) is stored: "float32", as it is; "float16" or
            "bfloat16"; "int8", embedding tables in whole numbers of a byte with a step a row, which are fixed from then
            on, and the rest in float16. The model's values are rounded to that here, so this moves its logits;
            it goes on computing in float32. `python -m stompp_hf compare` says by how much.

    Raises:
        NotBinarizedError: the model has no binary layers.
        PackingError: it is packed already, is to stay in full precision, has stages that are not frozen (they are
            named), or a binary layer without a packed class; or a value is too large for float16.
        ShardingError: its parameters are sharded over processes.
        NotCalibratedError: a layer has no activation values.
        NonFiniteError: a latent weight is NaN or infinite: its sign means nothing.
    """
    refuse_sharded(model, "pack_model", GATHER)
    planned = list(planned_models(model).values())
    roots = [root for root in planned if not get_plan(root).packed] or planned
    roots = [root for root in roots if get_plan(root).freezing] or roots  # a part that stays real stays as it is
    for root in roots:
        _check(get_plan(root), members(root), commit)
        check_real(root, real)
    for root in roots:
        _pack(root, real)
    return model


def _pack(root: nn.Module, real: str) -> None:
    plan, found = get_plan(root), members(root)
    if not all(member.is_settled for member in found.values()):
        total = max(1, *(member.total_steps for member in found.values()))
        for member in found.values():
            member.advance(total, total)  # the run is over: an unpacked model stays frozen
        write_states(list(found.values()))
    pack_members(found)
    store_real(root, plan, real)
    plan.packed = True
    record(root, plan)


def _check(plan: Plan, found: Mapping[str, Member], commit: bool) -> None:
    if plan.packed:
        raise PackingError("pack_model: this model is packed already; stompp_hf.unpack_model(model) undoes it.")
    if plan.freezing == 0:
        option = "binarize='nothing'" if plan.config.binarize == "nothing" else "last_stage=0"
        raise PackingError(f"pack_model: {option} leaves every weight real, so there is nothing to pack.")
    states = {entry.name: entry.stage_name for entry in plan.entries if not found[entry.name].is_settled}
    if states and not commit:
        stages = list(dict.fromkeys(states.values()))
        raise PackingError(
            f"pack_model: {len(stages)} of {plan.stage_count} stages are not frozen yet: {', '.join(stages)}. Train to "
            "the end of the run, or pack_model(model, commit=True) to freeze them now, untrained."
        )
    for name, member in found.items():
        if member.always_real:
            continue
        if plan.config.binary_activations and member.needs_activation_values and not member.activation_ready:
            raise NotCalibratedError(
                f"pack_model: {name} has no activation values yet. Set them from data: progression = "
                "Progression(model, total_steps); progression.step(total_steps); stompp_hf.calibrate(model, batches); "
                "then pack_model(model)."
            )
        if member.latent is not None and not bool(torch.isfinite(member.latent.detach()).all()):
            raise NonFiniteError(
                f"pack_model: the latent weight of {name} is not finite, and its signs mean nothing. Load the last "
                "checkpoint from before it became so."
            )


def pack_members(found: Mapping[str, Member]) -> None:
    """Pack members in place, without a look at their state: also those of a model on the meta device."""
    plans: list[tuple[Any, Member, Any]] = []
    for name, member in found.items():
        if member.always_real:
            continue  # behind last_stage
        packed_class = PACKED_CLASSES.get(type(member))
        if packed_class is None:
            raise PackingError(
                f"pack_model: {name} is a {type(member).__name__}, which has no packed class; declare one with "
                "stompp_hf.modules.packed.register_packed."
            )
        plans.append((packed_class, member, packed_class.buffers_of(member)))
    for packed_class, member, buffers in plans:
        packed_class.pack(member, buffers)


def unpack_model(model: Model) -> Model:
    """Turn a packed model back into a trainable one, with every stage frozen, in place, and return the same model.

    Forward: bitwise what the packed model computes in float32. New latents are max(|s|, tiny) * sign(w), with s the
    weight scale (1 without scales): what the optimizer last saw is gone. A model in half precision is cast to float32.

    Raises:
        NotBinarizedError: the model has no binary layers.
        PackingError: the model is not packed.
    """
    roots = [root for root in planned_models(model).values() if get_plan(root).packed]
    if not roots:
        raise PackingError("unpack_model: this model is not packed; its latent weights are there.")
    for root in roots:
        plan, found = get_plan(root), members(root)
        unfuse(root)
        cast_to_float32(root, dataclasses.replace(plan.config, keep_dtype=False))
        for member in found.values():
            if isinstance(member, PackedMember):
                member.unpack()
        widen(root, plan)
        plan.packed = False
        record(root, plan)
    return model

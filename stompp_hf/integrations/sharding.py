"""Parameters that FSDP2 shards over processes: their whole values, their local parts, and how they are set.

Inside forward such a parameter is a plain, whole tensor, gathered for the time; outside it is a DTensor that holds one
part a process. Masks and buffers are plain and whole on every process.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ShardingError

_INSTEAD = "Use FSDP2: torch's fully_shard(...), or fsdp_version: 2 in accelerate's configuration."
_COPIES = (
    "DeepSpeed updates copies of the parameters that nothing outside it sees: calibrated scales would be lost, and "
    f"frozen entries could not be held. {_INSTEAD}"
)
GATHER = (
    "Gather it first: get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of "
    "torch.distributed.checkpoint.state_dict, and load that into a model that is not sharded."
)
"""What to do where whole parameters are needed."""
ONE_PROCESS = (
    "DataParallel (one process, several GPUs) copies the model at each step, without its masks. Start one process a "
    "GPU: accelerate launch script.py, or torchrun --nproc_per_node GPUS script.py."
)
"""Why DataParallel is refused, and what to do."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, one part of it on each process."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The values of all processes, without gradient. Every process must call it, and gets the same."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """The part on this process, without gradient: it shares memory with `tensor`."""
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def part_for(value: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor, equal on all processes, that belongs to this process's part of `like`."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None).to_local()


def assign(target: Tensor, value: Tensor) -> None:
    """Overwrite a parameter or buffer, sharded or not, with a whole tensor that is equal on all processes."""
    with torch.no_grad():
        local(target).copy_(part_for(value.to(target.dtype), target))


def _fsdp() -> Any:
    """torch's FSDP, if anything has imported it: before that nothing can be sharded."""
    return sys.modules.get("torch.distributed.fsdp")


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was applied to."""
    fsdp = _fsdp()
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def reshard(model: nn.Module) -> bool:
    """Free what forward has gathered, so that parameters are the sharded ones; returns whether there are any.

    What `fully_shard` was applied to last, the root, keeps its parameters gathered after forward: what is written to
    them then would be lost.
    """
    modules = sharded_modules(model)
    for module in modules:
        module.reshard()
    return bool(modules)


def summed(counts: Tensor, like: Tensor) -> Tensor:
    """Counts on this process, or over all of them where `like` is sharded."""
    if is_sharded(like):
        counts = counts.to(local(like).device)
        torch.distributed.all_reduce(counts)
    return counts


def everywhere(flag: Tensor, like: Tensor) -> bool:
    """Whether a flag is true on this process, and on all of them where `like` is sharded."""
    return not bool(summed((~flag).to(torch.int32), like))


def write_after_forward(model: nn.Module, members: list[Any]) -> list[Any]:
    """Keep the values that members without any set within the next forward; returns the hook's handle, if one is due.

    Within forward they are written to gathered parameters, which are thrown away before the backward pass.
    """
    waiting = list(members)
    if not waiting or not sharded_modules(model):
        return []

    def write(*_: Any) -> None:
        fresh = [member for member in waiting if member.observer is not None and member.observer.rows]
        if fresh:
            reshard(model)
        for member in fresh:
            waiting.remove(member)
            member.calibrate_observed(member.observer, first_call=True)

    return [model.register_forward_hook(write)]


def complete_states(optimizer: Any) -> None:
    """Give an optimizer its state, as it is before a first step, for every parameter that has none.

    Parameters of stages that wait get no gradient, so a sharded checkpoint would lack their state; but its loader asks
    for that of all parameters, and fails.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    parameters = [p for group in inner.param_groups for p in group["params"] if p.requires_grad]
    if all(inner.state.get(parameter) for parameter in parameters):
        return
    fresh = [parameter for parameter in parameters if not inner.state.get(parameter)]
    grads, options = [parameter.grad for parameter in parameters], [dict(group) for group in inner.param_groups]
    try:  # a step without gradients, rate and decay makes the state and changes nothing
        for parameter in parameters:
            parameter.grad = None
        for parameter in fresh:
            parameter.grad = torch.zeros_like(parameter)
        for group in inner.param_groups:
            rate = group["lr"]
            group["lr"] = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
            if "weight_decay" in group:
                group["weight_decay"] = 0.0
        inner.step()
    finally:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        for group, before in zip(inner.param_groups, options, strict=True):
            group.update(before)
    for parameter in fresh:
        step = inner.state.get(parameter, {}).get("step")
        if isinstance(step, Tensor):
            step.zero_()
        elif step is not None:
            inner.state[parameter]["step"] = 0


def refuse_unsupported(model: nn.Module) -> None:
    """Raise ShardingError for ways to split a model over processes that the progression cannot follow."""
    fsdp = _fsdp()
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise ShardingError(ONE_PROCESS)
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            raise ShardingError(
                f"{name or type(module).__name__} is wrapped by FullyShardedDataParallel (FSDP1), which flattens "
                f"parameters: masks and scales cannot follow them. {_INSTEAD}"
            )
        if type(module).__module__.partition(".")[0] == "deepspeed":
            raise ShardingError(f"{name or 'the model'} is DeepSpeed's {type(module).__name__}. {_COPIES}")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ShardingError(f"{name} is partitioned by DeepSpeed (ZeRO-3). {_COPIES}")


def refuse_optimizer(optimizer: Any) -> None:
    """Raise ShardingError for an optimizer of DeepSpeed, or accelerate's wrapper of one."""
    for one in (optimizer, getattr(optimizer, "optimizer", optimizer)):
        if "deepspeed" in type(one).__module__.split("."):
            raise ShardingError(f"{type(one).__name__} is an optimizer of DeepSpeed. {_COPIES}")


def refuse_sharded(model: nn.Module, what: str, instead: str) -> None:
    """Raise ShardingError if a model's parameters are sharded where `what` needs whole ones."""
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ShardingError(f"{what}: {name} is sharded over processes (FSDP2). {instead}")

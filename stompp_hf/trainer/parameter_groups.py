"""Parameter groups: what weight decay may touch in a binary network, and an optimizer for Trainer that uses them."""

from typing import Any

import torch
from torch import nn

from ..surgery.members import own_tensors, planned_model


def parameter_groups(model: nn.Module, weight_decay: float, lr: float | None = None) -> list[dict[str, Any]]:
    """Two groups for an optimizer: decayed, and not decayed.

    Latent weights, scales, thresholds and shifts are not decayed: decay pulls latents to 0, where signs flip, and
    shrinks the scales that alone carry magnitude. As usual, biases and normalization weights are not decayed either.

    Args:
        model: a binarized model, or a wrapper of one.
        weight_decay: decay of the first group.
        lr: learning rate of both groups; left to the optimizer if None.

    Raises:
        NotBinarizedError: the model has no binary layers.
    """
    planned_model(model)
    own = {id(tensor) for tensor in own_tensors(model)}
    norms = {
        id(parameter)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()  # LayerNorm, BatchNorm2d, LlamaRMSNorm, ...
        for parameter in module.parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spare = id(parameter) in own or id(parameter) in norms or name.endswith("bias")
            (spared if spare else decayed).append(parameter)
    rate = {} if lr is None else {"lr": lr}
    groups = ((decayed, weight_decay), (spared, 0.0))
    return [{"params": parameters, "weight_decay": decay, **rate} for parameters, decay in groups if parameters]


def create_optimizer(model: nn.Module, args: Any) -> torch.optim.Optimizer:
    """The optimizer that `TrainingArguments` asks for, with the groups above.

    Use: `Trainer(model, args, ..., optimizers=(create_optimizer(model, args), None))`.
    """
    from transformers import Trainer

    cls, options = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
    options = {key: value for key, value in options.items() if key not in ("params", "model", "optimizer_dict")}
    return cls(parameter_groups(model, args.weight_decay), **options)  # type: ignore[no-any-return]

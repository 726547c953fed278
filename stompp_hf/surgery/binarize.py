"""binarize_model and restore_model: convert layers in place, all of them or none."""

import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import StoMPPConfig
from ..errors import CheckpointError, ConfigError
from ..integrations.sharding import GATHER, refuse_sharded, refuse_unsupported
from ..integrations.torch import NOT_BROADCAST
from ..modules import BinaryAttention, BinaryEmbedding, BinaryLayer, Member, binary_class_of
from ..modules.activations import ABSORBED, DROPPED, PAUSED, REPLACEMENT, Changed, RPReLU, class_for
from ..modules.torch_encoder import unfuse_encoders
from .adapters import base_model, check_wrapped
from .attention_interface import NAMES, attach, detach_all, switch
from .members import binary_layers, get_plan, plain_name, planned_models, submodule
from .ownership import already_binary, check_module, disown, inner_model, own, own_configs, owner
from .plan import Plan
from .real_storage import widen
from .selection import select
from .unattended import attended, watch
from .unfusing import unfuse

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)


def binarize_model(model: Model, config: StoMPPConfig | None = None, example_inputs: Any = None) -> Model:
    """Convert the layers of a model that can become binary, in place, and return the same model.

    With nothing frozen yet the model computes what it did before, bit for bit (unless the configuration sets a clip).
    Parameters keep their names and identity; half-precision models are cast to float32 (see `keep_dtype`). Call it
    before `Trainer(...)` or an optimizer is created, since layers gain learnable scales and thresholds.

    Args:
        model: any nn.Module; a transformers model is probed with inputs made from its config. Inside PEFT's wrappers
            the base becomes binary, and adapters stay real; in a wrapper around one transformers model (as
            sentence-transformers'), that model. One that is binary already by the same options is returned as it is.
        config: the options; the defaults suit fine-tuning.
        example_inputs: one small batch (keyword arguments, a tuple, or one tensor) for the probe, as `model` takes it.

    Raises:
        AlreadyBinarizedError: the model has binary layers already, by other options or in a part of it.
        NothingToBinarizeError: no layer is left to binarize.
        PatternError: a pattern of the configuration matches nothing.
        ConfigError: the configuration asks for more stages than there are layers; or `model` is no nn.Module.
        AdapterError: PEFT put an adapter around a layer that reads or changes its weight (DoRA), or merged it.
    """
    config = StoMPPConfig() if config is None else config
    if not isinstance(config, StoMPPConfig):
        raise ConfigError(f"binarize_model needs a StoMPPConfig, not a {type(config).__name__}.")
    check_module(model)
    refuse_unsupported(model)
    root = base_model(model)
    if already_binary(root, config):
        logger.info("binarize_model: this model is binary already, by the same options, and is returned as it is.")
        return model
    refuse_sharded(model, "binarize_model", "Binarize first, then shard: fully_shard(...) after binarize_model(...).")
    root = inner_model(root) if example_inputs is None else root
    plan = select(root, config, example_inputs)
    check_wrapped(root, [entry.name for entry in plan.entries])
    own_configs(model)
    holder, plan = owner(root, plan)
    uncast = cast_to_float32(model, config)
    try:
        convert(holder, plan.renamed(plain_name))
    except BaseException:
        uncast()
        raise
    _keep_from_broadcast(model)
    logger.info("%s", report(model))
    watch(holder)
    return model


def convert(model: nn.Module, plan: Plan) -> None:
    """Convert what a plan names; if one fails, even halfway, restore it and those before it."""
    begun: list[nn.Module] = []
    element = plan.config.activation_mask == "element"
    try:
        for entry in plan.entries:
            if entry.kind == "attention":
                parent = submodule(model, entry.name.rpartition(".")[0])
                like = next(parent.parameters(), next(model.parameters()))
                product = BinaryAttention(plan.config, entry.shape or [], like)
                _train_as(like, product.parameters())
                attach(parent, product)
                continue
            module = submodule(model, entry.name)
            begun.append(module)
            binary_class = BinaryEmbedding if entry.kind == "embedding" else binary_class_of(module)
            if binary_class is None:
                raise CheckpointError(f"{entry.name} is a {type(module).__name__}, which has no binary class.")
            shape = tuple(entry.shape) if element and entry.shape else None
            layer = binary_class.convert(module, plan.config, entry.producer, entry.absorbed, shape)
            _train_as(layer.weight, layer.own_tensors().values())
        for name, how in plan.bypassed.items():
            activation: Any = submodule(model, name)
            activation.__class__ = class_for(how, type(activation))
        for name, readers in plan.shifted.items():
            shifted: Any = submodule(model, name)
            reader: Any = submodule(model, readers[0])
            shifted.__class__ = RPReLU
            spread = reader.product.per_feature(reader.weight.new_empty(1), reader.weight)
            shifted.begin(reader.product.features(reader.weight), spread.dim() - 1, reader.weight.detach())
            _train_as(reader.weight, shifted.parameters())
        for name, readers in plan.paused.items():
            dropout: Any = submodule(model, name)
            dropout.readers = [submodule(model, reader) for reader in readers]
            dropout.__class__ = PAUSED[type(dropout)]
        unfuse_encoders(model)
        if plan.attention is not None:
            switch(model, dict.fromkeys(NAMES, NAMES[plan.attention]))
    except BaseException:
        for module in begun:
            if isinstance(module, BinaryLayer):
                module.restore()
        detach_all(model)
        _put_back(model)
        raise
    own(model, plan)
    _keep_from_broadcast(model)


def _train_as(weight: Tensor, added: Iterable[Tensor]) -> None:
    """What was added to a part of the model that does not train (requires_grad=False) does not train either."""
    if not weight.requires_grad:
        for tensor in added:
            tensor.requires_grad_(False)


def _keep_from_broadcast(model: nn.Module, keep: bool = True) -> None:
    """Buffers that binarization added are equal on all processes, since they come from sums over them."""
    found = {name: member for name, member in model.named_modules() if isinstance(member, Member)}
    own = [f"{name}.{own}" for name, member in found.items() for own, _ in member.named_buffers(recurse=False)]
    names = [name for name in model.__dict__.pop(NOT_BROADCAST, []) if name not in own] + (own if keep else [])
    if names:
        setattr(model, NOT_BROADCAST, names)


def _put_back(model: nn.Module) -> None:
    """Activations and dropouts before binary layers become again what they were."""
    for module in list(model.modules()):
        if isinstance(module, Changed):
            module.restore()


def restore_model(model: Model) -> Model:
    """Turn binary layers back into plain ones with their latent weights, in place, and return the same model.

    Raises:
        NotBinarizedError: the model has no binary layers.
    """
    roots = list(planned_models(model).values())
    refuse_sharded(model, "restore_model", GATHER)
    _keep_from_broadcast(model, keep=False)
    for root in roots:
        _keep_from_broadcast(root, keep=False)
        unfuse(root)
        attended(root)
        for layer in [module for module in root.modules() if isinstance(module, BinaryLayer)]:
            layer.restore()  # also where others of the plan were replaced or removed
        widen(root, get_plan(root))
        detach_all(root)
        _put_back(root)
        disown(root)
    return model


def cast_to_float32(model: nn.Module, config: StoMPPConfig) -> Callable[[], None]:
    """Cast half-precision tensors to float32 in place: small updates vanish on half-precision latents.

    Returns what undoes it, as long as the values are what they were.
    """
    half = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in (torch.float16, torch.bfloat16)]
    dtypes = [tensor.dtype for tensor in half]
    hub_configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values()
    stated = [(one, one.dtype) for one in hub_configs if one.dtype is not None]

    def undo() -> None:
        for tensor, dtype in zip(half, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)
        for hub_config, dtype in stated:
            hub_config.dtype = dtype

    if not half:
        return undo
    if config.keep_dtype:
        logger.warning("keep_dtype=True: latent weights stay %s, and small updates vanish on them.", half[0].dtype)
        return undo
    logger.warning(
        "the model is stored as %s; cast to float32, so that small updates of latent weights are not lost "
        "(StoMPPConfig(keep_dtype=True) keeps it).",
        half[0].dtype,
    )
    for tensor in half:
        tensor.data = tensor.data.float()
    for hub_config, _ in stated:
        hub_config.dtype = torch.float32
    return undo


def report(model: nn.Module) -> str:
    """What was converted, in which stages, what was left real and why, and how many parameters become binary.

    It tells the plan, which is the same from surgery to the end; `summary` tells bits, bytes and products at any time.
    """
    plan, layers = get_plan(model), binary_layers(model)
    freezing = {*plan.of_kind("layer"), *plan.of_kind("embedding")}
    binary = sum(layer.weight_count for name, layer in layers.items() if plain_name(name) in freezing)
    total = sum(parameter.numel() for parameter in model.parameters()) + (binary if plan.packed else 0)
    what = "are packed, 8 a byte" if plan.packed else "become binary"
    lines = [
        f"{len(plan.of_kind('layer'))} binary layers in {plan.stages_in_words} ({plan.config.binarize}, order "
        f"{plan.config.order}); {binary:,} of {total:,} parameters ({binary / total:.1%}) {what}"
    ]
    for stage, name in enumerate(plan.stage_names):
        inside = [entry.name for entry in plan.entries if entry.stage == stage]
        short = [item.removeprefix(f"{name}.") for item in inside]
        lines.append(f"  stage {stage + 1} {name}" + ("" if inside == [name] else f": {', '.join(short)}"))
    changes = {ABSORBED: "absorbed into the layers they feed", DROPPED: "dropped", REPLACEMENT: "that became ReLUs"}
    for what, text in changes.items():
        names = [name for name, how in plan.bypassed.items() if how == what]
        if names:
            lines.append(f"  activations {text}: {', '.join(names)}")
    if plan.shifted:
        lines.append(f"  ReLUs with learnable shifts (RPReLU): {', '.join(plan.shifted)}")
    if attention := plan.of_kind("attention"):
        lines.append(
            f"  attention products in {len(attention)} modules (queries, keys, values in {{-a, a}}, probabilities in "
            "{0, 2a})"
        )
    if embedding := plan.of_kind("embedding"):
        lines.append(f"  the word embedding: {', '.join(embedding)}")
    if plan.paused:
        lines.append(f"  dropouts that stop once a layer they feed freezes: {', '.join(plan.paused)}")
    lines += [f"  left real: {name}: {reason}" for name, reason in plan.left.items()]
    return "\n".join(lines)

"""Saving and reloading through transformers: the training format and the packed one, as a quantization method.

A binarized model's config carries a `StoMPPQuantizationConfig`; `save_pretrained` writes it, and `from_pretrained`
hands it to `StoMPPQuantizer`, which re-creates the binary layers before the weights are loaded. A plain checkpoint that
is loaded with `quantization_config=StoMPPConfig(...)` is binarized once its weights are there. Importing this module
registers both; without that import transformers would fill the layers at random.
"""

import logging
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from .config import METHOD, StoMPPConfig
from .errors import CheckpointError
from .modules import BinaryEmbedding, binary_class_of
from .modules.activations import RPReLU
from .packing import pack_members
from .plan import Entry, members
from .progression import Progression
from .quantization_config import StoMPPQuantizationConfig
from .surgery import binarize_model, convert

logger = logging.getLogger(__name__)


class StoMPPQuantizer(HfQuantizer):
    """Re-creates binary layers for `from_pretrained`; afterwards the model is an ordinary, trainable one."""

    requires_calibration = False
    quantization_config: StoMPPQuantizationConfig | StoMPPConfig

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.shapes: dict[str, torch.Size] = {}
        if not self.pre_quantized and not isinstance(quantization_config, StoMPPConfig):
            raise CheckpointError(
                f"from_pretrained(quantization_config=...) of a plain checkpoint takes a StoMPPConfig, as in "
                f"quantization_config=StoMPPConfig(), and not a {type(quantization_config).__name__}; or load it "
                "without, and call model = stompp_hf.binarize_model(model, StoMPPConfig())."
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if isinstance(self.quantization_config, StoMPPConfig):
            return  # the probe needs weights: binarize_model runs once they are there
        plan = self.quantization_config.plan()
        prefix = model.base_model_prefix
        modules = dict(model.named_modules())
        for entry in plan.entries:
            entry.name = _entry_in(model, modules, entry, prefix)
        # What stood before layers that this class of model lacks is lacking with them.
        plan.bypassed = {new: how for name, how in plan.bypassed.items() if (new := _name_in(modules, name, prefix))}
        for changed in ("paused", "shifted"):
            found = {
                new: [_layer_in(model, modules, reader, prefix) for reader in readers]
                for name, readers in getattr(plan, changed).items()
                if (new := _name_in(modules, name, prefix))
            }
            setattr(plan, changed, found)
        convert(model, plan)
        if plan.packed:
            pack_members(members(model))
            for member in members(model).values():
                member._is_hf_initialized = True  # type: ignore[assignment]  # init_weights() would look at its weight
        self.shapes = {
            f"{name}.{own}": tensor.shape
            for name, m in _converted(model).items()
            for own, tensor in _tensors(m).items()
        }

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether transformers should leave a tensor's shape to us; its own error does not name the tensor."""
        return param_name in self.shapes

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if isinstance(kwargs.get("device_map"), dict) and "disk" in kwargs["device_map"].values():
            logger.warning("layers of this model are offloaded to disk; it can run, and cannot be trained.")
        if isinstance(self.quantization_config, StoMPPConfig):
            _unmark(model)
            _align(model)
            return binarize_model(model, self.quantization_config)
        for name, module in _converted(model).items():
            for own, tensor in _tensors(module).items():
                self._check(f"{name}.{own}", tensor)
        layers = members(model)
        for layer in layers.values():
            layer.read_state()
        _align(model)
        _unmark(model)
        model.config.quantization_config = StoMPPQuantizationConfig(**model.stompp_plan.to_dict())
        first = next(iter(layers.values()))
        if model.stompp_plan.packed:
            return model
        if first.total_steps:
            progression = Progression(model, first.total_steps)
            progression.step(first.step)
            progression.detach()
        if kwargs.get("dtype") in (torch.float16, torch.bfloat16):
            logger.warning("loaded as %s: fine to run, but small updates vanish when it is trained.", kwargs["dtype"])
        return model

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        if not getattr(tensor, "_is_hf_initialized", False):
            raise CheckpointError(
                f"{name} is missing in the checkpoint, although its config.json says that the module was binarized: "
                "the weights were saved without it, or the file is not the one that belongs here."
            )
        if tensor.shape != self.shapes[name]:
            raise CheckpointError(
                f"{name} has the shape {list(tensor.shape)} in the checkpoint, and by its config.json it should have "
                f"{list(self.shapes[name])}: one of the two is not the file that belongs here."
            )
        if name.endswith(".weight_bits") and tensor.dtype != torch.uint8:
            raise CheckpointError(f"{name} is {tensor.dtype} in the checkpoint, and must be torch.uint8.")

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True


def _converted(model: PreTrainedModel) -> dict[str, Any]:
    """The modules to which binarization added tensors, by name."""
    return {**members(model), **{name: m for name, m in model.named_modules() if isinstance(m, RPReLU)}}


def _tensors(module: Any) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def _unmark(model: PreTrainedModel) -> None:
    """From here on the model is a plain one to transformers and Trainer; only its config remembers."""
    del model.config.quantization_config
    model.is_quantized = False
    for attribute in ("hf_quantizer", "quantization_method"):
        if attribute in model.__dict__:
            delattr(model, attribute)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = False


def _align(model: PreTrainedModel) -> None:
    """Move tensors that lie at odd addresses: a small float product rounds differently there.

    Weights are loaded where they lie in the file; without this, what stays real in a model (a classifier's head, say)
    would give logits that differ from the trained model's in their last bits.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def _name_in(modules: dict[str, Any], name: str, prefix: str) -> str | None:
    """The name that a saved module has in a model, which may have gained or lost its base model's prefix."""
    names = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
    return next((name for name in names if name in modules), None)


def _layer_in(model: PreTrainedModel, modules: dict[str, Any], name: str, prefix: str) -> str:
    found = _name_in(modules, name, prefix)
    if found is None or binary_class_of(modules[found]) is None:
        raise CheckpointError(
            f"the checkpoint says that {name} is binary, and {type(model).__name__} has no such layer, or one of "
            "another type: load it with the class that it was saved from, or one that contains it."
        )
    return found


def _entry_in(model: PreTrainedModel, modules: dict[str, Any], entry: Entry, prefix: str) -> str:
    if entry.kind == "layer":
        return _layer_in(model, modules, entry.name, prefix)
    name, dot, child = entry.name.rpartition(".") if entry.kind == "attention" else (entry.name, "", "")
    found = _name_in(modules, name, prefix)
    if found is None or (entry.kind == "embedding" and BinaryEmbedding.unfit(modules[found])):
        raise CheckpointError(
            f"the checkpoint says that the {entry.kind} of {name} is binary, and {type(model).__name__} has no such "
            "module, or one of another type: load it with the class that it was saved from, or one that contains it."
        )
    return f"{found}{dot}{child}"


def _register() -> None:
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(StoMPPQuantizationConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(StoMPPQuantizer)


_register()

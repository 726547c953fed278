"""Saving and reloading through transformers: the training format and the packed one, as a quantization method.

A binarized model's config carries a `StoMPPQuantizationConfig`; `save_pretrained` writes it, and `from_pretrained`
hands it to `StoMPPQuantizer`, which re-creates the binary layers before the weights are loaded. A plain checkpoint that
is loaded with `quantization_config=StoMPPConfig(...)` is binarized once its weights are there. Importing this module
registers both; without that import transformers would fill the layers at random.
"""

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from ..config import METHOD, StoMPPConfig
from ..errors import CheckpointError, StoMPPError
from ..integrations.torch import saved_tensors, unlistened
from ..integrations.transformers import mark_initialized, mark_plain, show_all
from ..modules import TRANSITION, BinaryEmbedding, binary_class_of
from ..modules.converted import Converted
from ..surgery.binarize import binarize_model, convert
from ..surgery.members import members, members_of
from ..surgery.ownership import own_configs, plans_of
from ..surgery.plan import Entry, Plan
from ..surgery.quantization_config import StoMPPQuantizationConfig
from ..surgery.real_storage import narrow_tables, write_narrow
from ..surgery.unattended import watch
from .checks import check_loaded, check_names, expected_tensors, name_in
from .checksums import check_files
from .files import read_header, tensors_in
from .packing import pack_members
from .reading import is_straight, read_straight

logger = logging.getLogger(__name__)


class StoMPPQuantizer(HfQuantizer):
    """Re-creates binary layers for `from_pretrained`; afterwards the model is an ordinary, trainable one."""

    quantization_config: StoMPPQuantizationConfig | StoMPPConfig

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.expected: dict[str, torch.Tensor] = {}
        self.names: dict[str, bool] = {}
        self.files: dict[Path, Any] = {}
        if not self.pre_quantized and not isinstance(quantization_config, StoMPPConfig):
            raise CheckpointError(
                f"from_pretrained(quantization_config=...) of a plain checkpoint takes a StoMPPConfig, as in "
                f"quantization_config=StoMPPConfig(), and not a {type(quantization_config).__name__}; or load it "
                "without, and call model = stompp_hf.binarize_model(model, StoMPPConfig())."
            )

    @property
    def has_own_names(self) -> bool:
        """Whether a checkpoint was saved under the names of the model's modules: no tensor is to be converted."""
        return not isinstance(self.quantization_config, StoMPPConfig) and self.quantization_config.has_own_names

    @property
    def finds_all(self) -> bool:
        """Whether the model has a tensor for each name in the files, too: none is to be renamed."""
        return self.has_own_names and all(self.names.values())

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if isinstance(self.quantization_config, StoMPPConfig):
            return  # the probe needs weights: binarize_model runs once they are there
        if "checkpoint_files" not in kwargs:
            raise CheckpointError(
                f"transformers {transformers.__version__} does not tell a quantization method which files it loads, "
                "and names and checksums of binary layers could not be checked: pip install -U 'transformers>=5.20'."
            )
        files = [Path(file) for file in kwargs["checkpoint_files"] or [] if str(file).endswith(".safetensors")]
        read = {file: read_header(file) for file in files}
        with unlistened():  # the default device is the meta one here, and each look at a tensor asks for it
            self.expected = expected_tensors(model, self._prepare_parts(model, self.quantization_config))
            self.names = check_names(model, (tensor for header, _ in read.values() for tensor in tensors_in(header)))
        check_files(read, self.quantization_config.get("save"))
        self.files = read if is_straight(kwargs["device_map"]) else {}

    def _prepare_parts(self, model: PreTrainedModel, config: StoMPPQuantizationConfig) -> dict[str, Plan]:
        modules, prepared = dict(model.named_modules()), {}
        for name, plan in config.plans().items():
            place = name_in(modules, name, model.base_model_prefix) if name else ""
            if place is None or not isinstance(modules[place], PreTrainedModel):
                raise CheckpointError(
                    f"the checkpoint says that {name} is binary, and {type(model).__name__} has no such part: load it "
                    "with the class that it was saved from, and take what you need from there."
                )
            if place:
                own_configs(modules[place])  # its config is a part of the whole model's
            _prepare(modules[place], plan)
            prepared[place] = plan
        return prepared

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """Read what can be, and leave out conversions of tensors, where a checkpoint's names are those of the modules.

        It is asked once the model is prepared, right before transformers looks for what it has to load.
        """
        if not self.has_own_names:
            return super().update_weight_conversions(weight_conversions, model)
        renamings = [conversion for conversion in weight_conversions if isinstance(conversion, WeightRenaming)]
        read_straight(model, self.files, renamings)
        return renamings

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Nothing: it goes over all names, to add those that other methods give to the parts of a weight."""

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether transformers should leave a tensor's shape to us; its own error does not name the tensor."""
        return param_name in self.expected

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # transformers passes no dtype or device map here: the model itself says what became of them.
        if "disk" in getattr(model, "hf_device_map", {}).values():
            logger.warning("layers of this model are offloaded to disk; it can run, and cannot be trained.")
        if isinstance(self.quantization_config, StoMPPConfig):
            _unmark(model)
            _align(model)
            return binarize_model(model, self.quantization_config)
        show_all(model)
        plans = plans_of(model)
        check_loaded(model, plans, self.expected, set(self.names))
        _align(model)
        _unmark(model)
        model.config.quantization_config = StoMPPQuantizationConfig.of(plans)
        for name, plan in plans.items():
            _finish(model.get_submodule(name), plan)
        watch(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True


def _prepare(root: PreTrainedModel, plan: Plan) -> None:
    """Make a model on the meta device what its saved plan says, so that its tensors find their places."""
    try:
        _place(root, plan)
        convert(root, plan)
        if plan.packed:
            pack_members(members_of(root, plan))
            narrow_tables(root, plan)
    except StoMPPError:
        raise
    except Exception as error:  # names and values that no release wrote
        raise CheckpointError(
            f"the plan in config.json does not fit a {type(root).__name__} ({error!r}): it is damaged, or belongs "
            "to another model."
        ) from error
    if plan.packed:
        for member in members_of(root, plan).values():
            mark_initialized(member)  # init_weights() would look at its weight


def _finish(root: PreTrainedModel, plan: Plan) -> None:
    """What is due once the tensors are there: members stand where those say."""
    if plan.packed:
        write_narrow(root, plan)
        return
    layers = members(root)
    first = next(iter(layers.values()))
    moving = [name for name, layer in layers.items() if layer.stage_state == TRANSITION and layer.like.is_meta]
    if moving:
        raise CheckpointError(
            f"{moving[0]} is between real and binary, and its masks cannot be offloaded to disk: load this "
            "checkpoint without a device_map that names 'disk', or one of a finished run."
        )
    if first.like.dtype in (torch.float16, torch.bfloat16):
        logger.warning("loaded as %s: fine to run, but small updates vanish when it is trained.", first.like.dtype)


def _unmark(model: PreTrainedModel) -> None:
    """From here on the model is a plain one to transformers and Trainer; only its config remembers."""
    del model.config.quantization_config
    model.is_quantized = False
    for attribute in ("hf_quantizer", "quantization_method"):
        if attribute in model.__dict__:
            delattr(model, attribute)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            mark_plain(module.config)


@torch.inference_mode(False)
def _align(model: PreTrainedModel) -> None:
    """Move tensors that lie at odd addresses: a small float product rounds differently there.

    Weights are loaded where they lie in the file; without this, what stays real in a model (a classifier's head, say)
    would give logits that differ from the trained model's in their last bits. Tables of which rows are taken, and what
    scales, cuts or holds signs, are in no such product, and stay in the file until they are read.
    """
    for module in model.modules():
        ours = isinstance(module, Converted)
        if isinstance(module, nn.Embedding) or (ours and module.is_packed):
            continue
        skipped = module.own_names if ours else ()
        for name, tensor in saved_tensors(module).items():
            if name not in skipped and tensor.device.type == "cpu" and tensor.data_ptr() % 64:
                tensor.data = tensor.data.clone()


def _place(model: PreTrainedModel, plan: Plan) -> None:
    """Give a saved plan the names that its modules have in this model, in place."""
    prefix, modules = model.base_model_prefix, dict(model.named_modules())
    for entry in plan.entries:
        entry.name = _entry_in(model, modules, entry, prefix)
    # What stood before layers that this class of model lacks is lacking with them.
    plan.bypassed = {new: how for name, how in plan.bypassed.items() if (new := name_in(modules, name, prefix))}
    plan.int8 = [new for name in plan.int8 if (new := name_in(modules, name, prefix))]
    for changed in ("paused", "shifted"):
        found = {
            new: [_layer_in(model, modules, reader, prefix) for reader in readers]
            for name, readers in getattr(plan, changed).items()
            if (new := name_in(modules, name, prefix))
        }
        setattr(plan, changed, found)


def _layer_in(model: PreTrainedModel, modules: dict[str, Any], name: str, prefix: str) -> str:
    found = name_in(modules, name, prefix)
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
    found = name_in(modules, name, prefix)
    if found is None or (entry.kind == "embedding" and BinaryEmbedding.unfit(modules[found])):
        raise CheckpointError(
            f"the checkpoint says that the {entry.kind} of {name} is binary, and {type(model).__name__} has no such "
            "module, or one of another type: load it with the class that it was saved from, or one that contains it."
        )
    return f"{found}{dot}{child}"


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(StoMPPQuantizationConfig)
if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(METHOD)(StoMPPQuantizer)

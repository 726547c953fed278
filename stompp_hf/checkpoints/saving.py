"""PreTrainedModel.save_pretrained and from_pretrained, as `stompp_hf.hooks` makes them ask this library first.

Every way to a checkpoint with a config.json leads through save_pretrained: Trainer's, accelerate's examples',
sentence-transformers', a larger model's, a part's. There a model with a plan is held to what loading will demand, its
plan is written as it stands, and checksums go with it. from_pretrained leaves out what a config does not know of, and
only says so: the bits of a binary model must not be left out. What it converts on the way is none of ours.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from transformers.quantizers import HfQuantizer

from ..config import METHOD
from ..errors import CheckpointError
from ..integrations.sharding import is_sharded
from ..integrations.transformers import saves_adapter_alone
from ..surgery.ownership import plans_of
from ..surgery.quantization_config import StoMPPQuantizationConfig
from . import quantizer  # it registers the format, too
from .checks import OWNERS, check_written, expected_tensors, name_in
from .checksums import KEY, note_of
from .reading import loading_by


class _Writer(HfQuantizer):
    """What transformers asks, while a model is saved, for its tensors and for the metadata of its files."""

    def __init__(self, written: dict[str, Tensor], metadata: dict[str, str]) -> None:
        self.written, self.metadata = written, metadata

    def get_state_dict_and_metadata(self, model: Any, *unused: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        return self.written, self.metadata

    def is_serializable(self, *unused: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def save_pretrained(
    save: Callable[..., Any],
    self: Any,
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: Any = None,
    *args: Any,
    **options: Any,
) -> Any:
    """transformers' own; a binarized model is first held to what loading demands, and saved with checksums.

    Raises:
        CheckpointError: what would be saved could not be loaded.
        NonFiniteError: a latent weight, a scale or a threshold is NaN or infinite.
        NotBinarizedError: a binary layer was replaced or removed after binarize_model.
    """
    if saves_adapter_alone(self):  # the adapter alone is saved
        return save(self, save_directory, is_main_process, state_dict, *args, **options)
    plans = plans_of(self)
    if not plans:
        with _config_says(self.config, None):
            return save(self, save_directory, is_main_process, state_dict, *args, **options)
    written = self.state_dict() if state_dict is None else state_dict
    note: dict[str, Any] = {}
    if is_main_process or any(map(is_sharded, written.values())):  # what is sharded is looked at by all processes
        try:
            check_written(self, written)
        except CheckpointError as error:
            raise CheckpointError(
                f"this {type(self).__name__} is not saved, since it would not load: {error}"
            ) from error
    if is_main_process:
        note = note_of(written, expected_tensors(self, plans))
    options["save_original_format"] = False  # whoever loads it has this library, and reads the names of the modules
    with (
        _config_says(self.config, StoMPPQuantizationConfig.of(plans, note.get("save"))),
        _metadata_of(self, written, note),
    ):
        return save(self, save_directory, is_main_process, None, *args, **options)


def from_pretrained(
    load: Callable[..., Any], cls: Any, *args: Any, output_loading_info: bool = False, **options: Any
) -> Any:
    """transformers' own; a checkpoint with binary layers is not loaded by a config that does not know of them.

    Raises:
        CheckpointError: it would be; latent weights alone make a plausible model in full precision.
    """
    with loading_by(options):
        model, info = load(cls, *args, output_loading_info=True, **options)
    left_out = [name for name in sorted(info["unexpected_keys"]) if name.rpartition(".")[2] in OWNERS]
    modules = dict(model.named_modules()) if left_out and not plans_of(model) else {}
    left_out = [name for name in left_out if name_in(modules, name.rpartition(".")[0], model.base_model_prefix)]
    if left_out:
        raise CheckpointError(
            f"this checkpoint holds binary layers ({left_out[0]}, for one), and the config that it was loaded by says "
            f"nothing of them: a {cls.__name__} would be real, with weights that were trained to be binary. Load it "
            "without config=..., with the class that it was saved from; or take the config from there: "
            "AutoConfig.from_pretrained(folder)."
        )
    return (model, info) if output_loading_info else model


def conversions(
    find: Callable[..., Any], model: Any, key_mapping: Any = None, hf_quantizer: Any = None, **options: Any
) -> Any:
    """transformers' get_model_conversion_mapping; it looks for nothing where a model finds all of its own names.

    To look, it would first make the tables of all its classes, with all their patterns to compile.
    """
    if key_mapping is None and isinstance(hf_quantizer, quantizer.StoMPPQuantizer) and hf_quantizer.finds_all:
        return hf_quantizer.update_weight_conversions([], model)
    return find(model, key_mapping, hf_quantizer, **options)


@contextlib.contextmanager
def _config_says(config: Any, value: StoMPPQuantizationConfig | None) -> Iterator[None]:
    """Inside the block a config tells of these plans, or of none; what other libraries wrote there stays."""
    before = vars(config).get("quantization_config")
    if value is None and not _is_ours(before):
        yield
        return
    vars(config).pop("quantization_config", None)
    if value is not None:
        config.quantization_config = value
    try:
        yield
    finally:
        vars(config).pop("quantization_config", None)
        if before is not None:
            config.quantization_config = before


def _is_ours(value: Any) -> bool:
    method = value.get("quant_method") if isinstance(value, dict) else getattr(value, "quant_method", None)
    return bool(method == METHOD)


@contextlib.contextmanager
def _metadata_of(model: Any, written: dict[str, Tensor], note: dict[str, Any]) -> Iterator[None]:
    """Inside the block `model.save_pretrained` writes these tensors, with this note in the metadata of each file."""
    model.hf_quantizer = _Writer(written, {KEY: json.dumps(note, sort_keys=True)} if note else {})
    try:
        yield
    finally:
        del model.hf_quantizer

"""transformers' insides, one small function each; tests/test_integrations.py tells when one of their names goes."""

from typing import Any

INIT_WEIGHTS = "_init_weights"
"""A model's method that draws weights."""


def attention_of(config: Any) -> str | None:
    """The attention implementation that a config names: `_attn_implementation`."""
    return getattr(config, "_attn_implementation", None)


def set_attention(config: Any, name: str | None) -> None:
    """Name another: `_attn_implementation_internal`. The public setter would change sub-configs as well."""
    config._attn_implementation_internal = name


def mark_initialized(thing: Any) -> None:
    """init_weights() leaves a parameter or a module alone that has `_is_hf_initialized`."""
    thing._is_hf_initialized = True


def is_initialized(tensor: Any) -> bool:
    """Whether from_pretrained has loaded a tensor: `_is_hf_initialized`."""
    return bool(getattr(tensor, "_is_hf_initialized", False))


def not_saved(model: Any) -> set[str]:
    """Names that a state dict of the model has and its files have not: `_keys_to_ignore_on_save`."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def may_be_missing(model: Any) -> list[str]:
    """Patterns of names that a checkpoint may lack: `_keys_to_ignore_on_load_missing`."""
    return list(model._keys_to_ignore_on_load_missing or ())


def show_only(model: Any, left: dict[str, Any], read: dict[str, str]) -> None:
    """While a model is loaded, the loader sees these of its tensors alone, and expects the others in files as well.

    It stands on `state_dict` and `named_buffers` as what the loader asks, and `_adjust_missing_and_unexpected_keys` as
    what it tells.

    Args:
        model: the model.
        left: of its state dict, what is to be loaded.
        read: what is there already: its name in the model, by that in the files.
    """
    adjust, buffers, there = model._adjust_missing_and_unexpected_keys, model.named_buffers, set(read.values())

    def adjusted(found: Any) -> None:
        found.unexpected_keys -= read.keys()
        adjust(found)

    model.state_dict = lambda *_, **__: dict(left)
    model.named_buffers = lambda *args, **options: (pair for pair in buffers(*args, **options) if pair[0] not in there)
    model._adjust_missing_and_unexpected_keys = adjusted


def show_all(model: Any) -> None:
    """Undo `show_only`, where that was done."""
    for name in ("state_dict", "named_buffers", "_adjust_missing_and_unexpected_keys"):
        vars(model).pop(name, None)


def mark_plain(config: Any) -> None:
    """Trainer takes a model for a quantized one by its config's `_is_quantized`."""
    config._is_quantized = False


def saves_adapter_alone(model: Any) -> bool:
    """Whether model.save_pretrained writes PEFT's adapters and nothing else: `_hf_peft_config_loaded`."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def auto_class_for(auto: Any, model_type: Any) -> str | None:
    """Name of the class that an AutoModel class gives a model type: two `_model_mapping`, one in the other."""
    mapping = getattr(auto, "_model_mapping", None)
    name = None if mapping is None else mapping._model_mapping.get(model_type)
    return name if isinstance(name, str) else None


def prepared(trainer: Any, batch: Any) -> Any:
    """A batch as Trainer hands it to the model, on its device: `_prepare_inputs`."""
    return trainer._prepare_inputs(batch)


def wait_after_random_state(trainer: Any) -> None:
    """Processes write their random states together: rank 0 goes on to delete older ones. `_save_rng_state`."""
    save = getattr(trainer, "_save_rng_state", None)
    if trainer.args.world_size < 2 or save is None:
        return

    def save_together(output_dir: str) -> None:
        save(output_dir)
        trainer.accelerator.wait_for_everyone()

    trainer._save_rng_state = save_together

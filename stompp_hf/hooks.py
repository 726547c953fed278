"""What other libraries are made to ask this one, from the moment that they are imported.

`import stompp_hf` is enough for all of it, and loads none of them: not transformers' models, which bring torch._dynamo
and scipy along, and not PEFT. What answers here is imported when it is asked for the first time.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

from .integrations.importing import when_imported
from .integrations.peft import guard_family


def install() -> None:
    """Stand ready at the two doors: loading and saving in transformers, adapters in PEFT."""
    when_imported("transformers.modeling_utils", _ask_first)
    when_imported("peft.tuners.tuners_utils", _guard_adapters)


def _ask_first(modeling: Any) -> None:
    """What saves and loads a PreTrainedModel, and converts its tensors, leads through here: see checkpoints.saving."""
    model = modeling.PreTrainedModel
    model.save_pretrained = _through("save_pretrained", model.save_pretrained)
    model.from_pretrained = classmethod(_through("from_pretrained", model.from_pretrained.__func__))
    if (find := getattr(modeling, "get_model_conversion_mapping", None)) is not None:  # else a load takes longer
        modeling.get_model_conversion_mapping = _through("conversions", find)


def _through(name: str, theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def asked(*args: Any, **options: Any) -> Any:
        return _ours("checkpoints.saving", name)(theirs, *args, **options)

    return asked


def _guard_adapters(tuners: Any) -> None:
    """What PEFT's classes do to a layer or a model is checked first: see surgery.adapters."""
    merges = dict.fromkeys(("merge_and_unload", "merge_adapter"), _check("check_model_merge"))
    guard_family(tuners.BaseTuner, {"inject_adapter": _check("check_adapter"), **merges})
    guard_family(tuners.BaseTunerLayer, {"merge": _check("check_layer_merge")})


def _check(name: str) -> Callable[..., None]:
    return lambda *args, **options: _ours("surgery.adapters", name)(*args, **options)


def _ours(module: str, name: str) -> Callable[..., Any]:
    return getattr(import_module(f".{module}", __package__), name)

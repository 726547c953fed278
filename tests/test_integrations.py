"""Private names of other libraries: each is still there, and stands in stompp_hf/integrations/ alone."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import stompp_hf
from stompp_hf.integrations import torch as insides
from stompp_hf.integrations.importing import when_imported

ROOT = Path(stompp_hf.__file__).parent

NAMES = {
    "torch": (
        *(
            "torch._C:_dispatch_tls_is_dispatch_key_included",
            "torch._C:_is_tracing",
            "torch._C:_len_torch_dispatch_stack",
        ),
        *(
            "torch._C:_len_torch_function_stack",
            "torch._C:_current_graph_task_id",
            "torch._C:DisableTorchFunction",
            "torch._C:DispatchKey.PythonDispatcher",
        ),
        *("torch._C._functorch:is_functorch_wrapped_tensor", "torch._C._functorch:maybe_current_level"),
        *("torch.autograd.forward_ad:_current_level", "torch.overrides:_get_current_function_mode_stack"),
        *("torch.nn.modules.batchnorm:_BatchNorm", "torch.nn.modules.conv:_ConvTransposeNd"),
        *("torch.utils._device:DeviceContext", "torch.utils._python_dispatch:TorchDispatchMode"),
        *("torch.utils._pytree:tree_leaves", "torch.ops:aten._scaled_dot_product_flash_attention_for_cpu"),
        *("torch:_foreach_copy_", "torch:_foreach_clamp_min_", "torch:Tensor._version", "torch:Tensor._base"),
        "torch:_int_mm",
        *("torch._dynamo.eval_frame:OptimizedModule", "torch._dynamo.eval_frame:cached_backends"),
        *("torch._dynamo.config:recompile_limit", "torch._dynamo.config:accumulated_recompile_limit"),
        *("torch._dynamo.config:fail_on_recompile_limit_hit", "torch._dynamo.config:patch"),
        *(
            f"torch.nn:Module().{name}"
            for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
        ),
        *(f"torch.nn:Module().{name}" for name in ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks")),
        *("torch.nn:Module._compiled_call_impl", "torch._dynamo.eval_frame:OptimizedModule '_orig_mod'"),
        "torch.nn.parallel:DistributedDataParallel '_ddp_params_and_buffers_to_ignore'",
    ),
    "transformers": (
        *("transformers.modeling_utils:PreTrainedModel._init_weights", "transformers.trainer:Trainer._save_rng_state"),
        *("transformers.trainer:Trainer._prepare_inputs", "transformers:AutoModel._model_mapping._model_mapping"),
        *("transformers.modeling_utils:PreTrainedModel._keys_to_ignore_on_save",),
        *("transformers.modeling_utils:PreTrainedModel._keys_to_ignore_on_load_missing",),
        *("transformers.modeling_utils:PreTrainedModel._adjust_missing_and_unexpected_keys",),
        *("transformers.modeling_utils:get_model_conversion_mapping", "transformers.modeling_utils '.named_buffers('"),
        *("transformers:PreTrainedConfig()._attn_implementation",),
        *("transformers:PreTrainedConfig '_attn_implementation_internal'",),
        *("transformers.modeling_utils '_is_hf_initialized'", "transformers.modeling_utils '_hf_peft_config_loaded'"),
        *("transformers.configuration_utils '_is_quantized'",),
    ),
    "accelerate": ("accelerate.hooks '_old_forward'",),
    "peft": (
        *(
            "peft.tuners.tuners_utils:BaseTuner._prepare_adapter_config",
            "peft.tuners.tuners_utils:BaseTuner.inject_adapter",
        ),
        *("peft.tuners.tuners_utils:BaseTuner._check_target_module_exists", "peft.tuners.tuners_utils:BaseTunerLayer"),
        *("peft.tuners.tuners_utils:BaseTunerLayer._get_available_adapters",),
    ),
}
"""By library: module:name, where () is an instance; or module:name 'text', for what its source must speak of."""


@pytest.mark.parametrize(("library", "name"), [(library, name) for library, names in NAMES.items() for name in names])
def test_a_private_name_is_still_there(library: str, name: str) -> None:
    place, _, text = name.partition(" ")
    module, _, path = place.partition(":")
    gone = f"{library} {version(library)}: `{name}` is gone; stompp_hf/integrations/{library}.py stands on it"
    try:
        found = importlib.import_module(module) if module != "torch.ops" else torch.ops
        for step in filter(None, path.split(".")):
            found = getattr(found, step.removesuffix("()"))
            found = found() if step.endswith("()") else found
    except (AttributeError, ImportError):
        pytest.fail(gone)
    assert not text or text.strip("'") in inspect.getsource(found), gone


def test_a_constant_is_marked_as_torch_marks_it() -> None:
    ours, theirs = (mark(lambda: 1) for mark in (insides.constant_when_compiled, torch.compiler.assume_constant_result))
    assert vars(ours) == vars(theirs)


def test_a_module_that_is_there_is_changed_at_once() -> None:
    seen: list[object] = []
    when_imported("torch", seen.append)
    assert seen == [torch]


# ---- in one room ----

OVERRIDDEN = {"_apply", "_load_from_state_dict"}
"""Methods of nn.Module that are there to be overridden; a super() call belongs to it."""
ENDINGS = {"_clip", "_low", "_high", "_scale", "_threshold", "_mask", "_binary", "_native"}
"""Parts of our own tensors' and files' names, no names themselves."""


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def is_own(node: ast.expr) -> bool:
    return ast.unparse(node) in ("self", "cls")


def is_name(value: object) -> bool:
    return isinstance(value, str) and all(part.isidentifier() for part in value.split("."))


def defined(tree: ast.AST) -> Iterator[str]:
    """What a file of ours names itself: functions, classes, arguments, variables, attributes of self, slots."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            yield node.attr


def used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The private names that a file reads: attributes, imports, and words in quotes that are names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Constant) and is_name(node.value):
            yield node.lineno, node.value


def foreign(files: dict[str, ast.AST]) -> list[str]:
    """Where files outside integrations/ use a private name that none of them defines."""
    outside = {path: tree for path, tree in files.items() if not path.startswith("integrations/")}
    inside = {name for path, tree in files.items() if path not in outside for _, name in used(tree)}
    own = {name for tree in outside.values() for name in defined(tree)} - inside
    allowed = own | OVERRIDDEN | ENDINGS
    return [
        f"{path}:{line}: {name}"
        for path, tree in sorted(outside.items())
        for line, name in used(tree)
        if is_private(name) and name not in allowed
    ]


def test_private_names_stand_in_one_room() -> None:
    found = (path for path in ROOT.rglob("*.py") if path.parent.name != "csrc")  # what builds the kernels is no part
    files = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in found}
    assert foreign(files) == [], "move it to stompp_hf/integrations/, and name it in NAMES"


@pytest.mark.parametrize(
    "line",
    ["x._version", "from torch._C import x", "import torch._dynamo", "getattr(x, '_hf_hook')", "self._parameters"],
)
def test_a_private_name_elsewhere_is_found(line: str) -> None:
    assert len(foreign({"modules/a.py": ast.parse(f"self._ours, _mine = 1, 2\nself._ours\n{line}")})) == 1

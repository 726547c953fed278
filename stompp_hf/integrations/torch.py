"""torch's insides: one small function each, or the name itself where one more call would cost.

Each line says what it stands on; tests/test_integrations.py tells when torch takes it away.
"""

import contextlib
import functools
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import (
    _dispatch_tls_is_dispatch_key_included as _is_included,  # type: ignore[attr-defined]
    _is_tracing as is_tracing,  # type: ignore[attr-defined]
    _len_torch_dispatch_stack as _dispatch_modes,
    _len_torch_function_stack as _function_modes,
)
from torch._C._functorch import is_functorch_wrapped_tensor as is_in_functorch, maybe_current_level as functorch_level
from torch.autograd import forward_ad as _forward_ad
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd as ConvTranspose
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["BatchNorm", "ConvTranspose", "TorchDispatchMode", "functorch_level", "is_in_functorch", "is_tracing"]

CPU_ATTENTION: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""What FlopCounterMode knows no count of."""
NOT_BROADCAST = "_ddp_params_and_buffers_to_ignore"
"""Where DistributedDataParallel looks for names that it is not to send from rank 0 to the others at each forward."""
VERSION = "_version"
"""A tensor's attribute that counts how often it was written."""

int_mm = torch._int_mm
"""int32 from a product of two matrices of int8."""

copy_all, clamp_min_all = torch._foreach_copy_, torch._foreach_clamp_min_
"""Many tensors in one call."""


# ---- who listens ----

_has_python_dispatcher = functools.partial(_is_included, torch._C.DispatchKey.PythonDispatcher)
"""Of make_fx before autograd, whose modes are not among the others."""

QUESTIONS: tuple[tuple[Any, str | None, Any], ...] = (
    (_dispatch_modes, None, 0),  # TorchDispatchMode: FlopCounterMode, FakeTensorMode, make_fx
    (functorch_level, None, None),  # torch.func: vmap, grad, jvp, functionalize
    (is_tracing, None, False),  # torch.jit.trace, and the older ONNX exporter
    (_function_modes, None, 0),
    (_forward_ad, "_current_level", -1),
    (_has_python_dispatcher, None, False),
)
"""Who may listen: what is called, or whose attribute is read, and the answer where nobody does (python.c asks so)."""


def is_watched() -> bool:
    """Whether anybody listens to torch's operations, or changes them, in this thread and at this moment: `QUESTIONS`.

    For eager code: what is compiled has to ask `torch.compiler.is_compiling` before.
    """
    return (
        _dispatch_modes() != 0
        or functorch_level() is not None
        or is_tracing()
        or (_function_modes() != 0 and _has_function_mode())
        or _forward_ad._current_level >= 0
        or _has_python_dispatcher()
    )


def _has_function_mode() -> bool:
    """Whether there is a TorchFunctionMode that is more than a default device."""
    modes: Any = torch.overrides._get_current_function_mode_stack()  # type: ignore[attr-defined]
    return any(type(mode) is not DeviceContext for mode in modes)


def unlistened() -> Any:
    """Inside the block nobody listens: not a default device either, which makes each look at a tensor dear."""
    return torch._C.DisableTorchFunction()


def has_tangent(*arguments: Any) -> bool:
    """Whether a forward-mode derivative comes with any of these (torch.func.jvp, torch.autograd.forward_ad)."""
    if torch.compiler.is_compiling() or _forward_ad._current_level < 0:
        return False
    return any(isinstance(t, Tensor) and _forward_ad.unpack_dual(t).tangent is not None for t in arguments)


def is_in_backward() -> bool:
    """Whether this forward runs inside a backward pass: it stands on `torch._C._current_graph_task_id`."""
    return bool(torch._C._current_graph_task_id() != -1)


# ---- tensors ----


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and mappings, in order: it stands on torch.utils._pytree."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written, `Tensor._version`; None for those of inference mode, which do not count it."""
    return None if tensor.is_inference() else tensor._version


def is_view(tensor: Tensor) -> bool:
    """Whether a tensor is a view of another one, `Tensor._base`."""
    return tensor._base is not None


class Seen:
    """A tensor as it was: whether it is another by now.

    torch counts the changes of a tensor, and holding its memory makes sure that other numbers lie elsewhere. It counts
    none of a tensor of inference mode, whose numbers are copied and compared.
    """

    __slots__ = ("memory", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.version = version_of(tensor)
        self.memory = tensor.detach().clone() if self.version is None else tensor.detach()

    def is_still(self, tensor: Tensor) -> bool:
        """Whether the tensor holds what it held."""
        if self.version is None or tensor.is_inference():
            return self.memory.dtype is tensor.dtype and torch.equal(_wide(self.memory), _wide(tensor))
        return tensor._version == self.version and tensor.data_ptr() == self.memory.data_ptr()


def _wide(tensor: Tensor) -> Tensor:
    """A tensor's bytes as whole numbers of eight, where they are: they are compared four times as fast."""
    whole = tensor.is_contiguous() and tensor.dim() and tensor.shape[-1] * tensor.element_size() % 8 == 0
    return tensor.view(torch.int64) if whole and tensor.storage_offset() * tensor.element_size() % 8 == 0 else tensor


# ---- what a module holds ----


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """A module's own parameters, `_parameters` itself: also those that are None, and what is written there stays."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """A module's own buffers, `_buffers` itself."""
    return module._buffers


def modules_of(module: nn.Module) -> dict[str, Any]:
    """A module's children, `_modules` itself: one that has two names is there twice."""
    return module._modules


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module itself that a state dict holds: it stands on `_non_persistent_buffers_set`."""
    left_out = module._non_persistent_buffers_set
    own = (*module._parameters.items(), *module._buffers.items())
    return {name: tensor for name, tensor in own if tensor is not None and name not in left_out}


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether anybody hooked a module's forward: `_forward_hooks` and `_forward_pre_hooks`."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def remove_forward_pre_hook(module: nn.Module, hook: Any) -> None:
    """Without its handle, which a copy of the module has not: it stands on `_forward_pre_hooks`."""
    _remove(module._forward_pre_hooks, hook)


def remove_state_dict_hook(module: nn.Module, hook: Any) -> None:
    """Without its handle, which there is none of: it stands on `_state_dict_hooks`."""
    _remove(module._state_dict_hooks, hook)


def remove_all(handles: list[Any]) -> None:
    """Remove hooks by their handles, and forget these."""
    for handle in handles:
        handle.remove()
    handles.clear()


def _remove(hooks: dict[int, Any], hook: Any) -> None:
    for key in [key for key, found in hooks.items() if found is hook]:
        del hooks[key]


# ---- torch.compile ----


def constant_when_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.assume_constant_result, which imports torch._dynamo: it stands on `_dynamo_marked_constant`."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def graph_number(value: float, like: Tensor) -> Any:
    """A number for an autograd function; in a compiled graph a tensor (): there a number may be symbolic
    (`torch.compile(dynamic=True)`, or one that changed), and torch takes no such into an autograd function.
    """
    if not torch.compiler.is_compiling():
        return value
    return torch.full((), value, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def compiled_call(module: nn.Module) -> str | None:
    """Name of what runs a module that `module.compile()` was called on, `_compiled_call_impl`; None for others."""
    return None if getattr(module, "_compiled_call_impl", None) is None else "_compiled_call_impl"


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was given to torch.compile, or wraps one that was: it has `_orig_mod`."""
    return compiled_call(module) is not None or hasattr(module, "_orig_mod")


def _dynamo() -> Any:
    """torch._dynamo, if anything has imported it: before that nothing is compiled."""
    return sys.modules.get("torch._dynamo")


def anything_is_compiled() -> bool:
    """Whether anything was given to torch.compile in this process: `eval_frame.cached_backends`."""
    dynamo = _dynamo()
    return dynamo is not None and any(one is not None for one in dynamo.eval_frame.cached_backends.values())


def compiled_wrappers() -> list[nn.Module]:
    """All that torch.compile put around modules, which do not know of it: `eval_frame.OptimizedModule`."""
    wrapper: Any = _dynamo().eval_frame.OptimizedModule
    return [one for one in gc.get_referrers(wrapper) if type(one) is wrapper]


@contextlib.contextmanager
def compiling(graphs: int, eager: bool) -> Iterator[None]:
    """Inside the block a module may have so many graphs, and one more is an error: torch._dynamo.config.

    Args:
        graphs: the limit of recompilations, where it is not higher already.
        eager: nothing compiled is run.
    """
    config = _dynamo().config
    limits = {"recompile_limit": graphs, "accumulated_recompile_limit": 16 * graphs}
    limits = {name: max(getattr(config, name), value) for name, value in limits.items()}
    stance = _dynamo().set_stance("force_eager") if eager else contextlib.nullcontext()
    with stance, config.patch(fail_on_recompile_limit_hit=True, **limits):
        yield


def forget_graphs() -> None:
    """Compile anew at the next call: hooks were added or removed, which graphs do not notice."""
    if _dynamo() is not None:
        torch.compiler.reset()

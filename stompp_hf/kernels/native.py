"""The compiled part: where it is, whether it is used, and with which instructions of this CPU.

STOMPP_KERNELS=torch|c|triton|auto   plain torch; compiled, or an error; Triton for tensors on a GPU, or an error (C as
    with auto); what is there (the default: of either kind)
STOMPP_KERNELS_CPU=portable|avx2|avx512|neon   instructions that may be used at most; by default the best of this CPU
"""

import contextlib
import ctypes
import importlib.machinery
import importlib.util
import os
import platform
from collections.abc import Iterator
from ctypes import POINTER, c_char_p, c_int, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import KernelError

MODE, LIMIT = "STOMPP_KERNELS", "STOMPP_KERNELS_CPU"
MODES, LIMITS = ("auto", "torch", "c", "triton"), ("", "portable", "avx2", "avx512", "neon")
LANES = 64
"""Of kernels.h."""
VERSION = 6
"""STOMPP_VERSION of the sources that these calls belong to."""
BUILD = 'pip install "stompp-hf" from its sources where a C compiler is (in a checkout: pip install -e .)'


class Shape(ctypes.Structure):
    """Shape of kernels.h: the sizes of a convolution."""

    _fields_ = (
        *((name, c_int64) for name in ("batch", "channels", "outputs", "groups")),
        *((name, c_int64 * 3) for name in ("inner", "outer", "kernel", "stride", "before", "dilation")),
        ("pad", c_int64),
    )


_INPUT = (c_void_p, c_int, c_void_p, c_void_p)  # x, its dtype, threshold, bits
_OUTPUT = (c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int)  # scale and its step, shift and its step, y, dtype
_FUNCTIONS: dict[str, tuple[object, tuple[object, ...]]] = {
    "stompp_choose": (c_char_p, (c_char_p,)),
    "stompp_set_team": (None, (c_void_p,)),
    "stompp_linear": (c_int, (*_INPUT, *_OUTPUT, c_int64, c_int64, c_int64, c_int)),
    "stompp_conv": (c_int, (*_INPUT, *_OUTPUT, POINTER(Shape), c_int)),
    "stompp_small_groups": (c_int, (*_INPUT, *_OUTPUT, POINTER(Shape), c_int)),
    "stompp_inner_loop": (c_int64, (c_int64,)),
    "stompp_has_real": (c_int, ()),
    "stompp_real_linear": (c_int, (*[c_void_p] * 3, c_int64, c_void_p, c_int64, c_void_p, *[c_int64] * 3, c_int)),
    "stompp_unpack": (None, (c_void_p, c_int64, c_int64, c_void_p)),
    "stompp_tap_words": (None, (c_void_p, c_int64, c_int64, c_int64, c_void_p)),
    "stompp_pack": (None, (c_void_p, c_int64, c_int64, c_int, c_void_p, c_int)),
    "stompp_mix": (None, (c_void_p, c_int)),
    "stompp_mix_backward": (None, (c_void_p, c_int)),
    "stompp_mix_weight_backward": (None, (c_void_p, c_int)),
    "stompp_levels": (None, (c_void_p, c_int)),
    "stompp_through_window": (None, (c_void_p, c_int)),
}


@dataclass(frozen=True)
class Choice:
    """What is used on a CPU: "c" or "torch", with which instructions, and why; and what STOMPP_KERNELS says."""

    used: str
    instructions: str
    reason: str
    native: ctypes.CDLL | None = None
    mode: str = "auto"


_chosen: Choice | None = None


def choice() -> Choice:
    """What is used in this process; decided at the first call, from the environment.

    Raises:
        KernelError: STOMPP_KERNELS=c without the compiled part, or a value that is none.
    """
    return _chosen if _chosen is not None else use()


def use(mode: str | None = None, cpu: str | None = None) -> Choice:
    """Decide anew what is used in this process.

    Args:
        mode: "torch", "c", "triton" or "auto"; None for what STOMPP_KERNELS says.
        cpu: "portable", "avx2", "avx512" or "neon", what may be used at most; None for what STOMPP_KERNELS_CPU says.

    Raises:
        KernelError: "c" without the compiled part, "triton" without Triton, or a value that is none.
    """
    global _chosen
    mode = os.environ.get(MODE, "auto") if mode is None else mode
    cpu = os.environ.get(LIMIT, "") if cpu is None else cpu
    for name, value, values in ((MODE, mode, MODES), (LIMIT, cpu, LIMITS)):
        if value not in values:
            known = ", ".join(word for word in values if word)
            raise KernelError(f"{name} is {value!r}, and must be one of {known}.")
    _chosen = _choose(mode, cpu)
    return _chosen


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    """Inside the block everything computes in plain torch, whatever was decided before."""
    global _chosen
    before, _chosen = _chosen, _choose("torch", "")
    try:
        yield
    finally:
        _chosen = before


def _choose(mode: str, cpu: str) -> Choice:
    if mode == "torch":
        return Choice("torch", "", f"{MODE}=torch", mode=mode)
    if mode == "triton" and importlib.util.find_spec("triton") is None:
        raise KernelError(f"{MODE}=triton, and triton is not installed. pip install triton; or set {MODE}=auto.")
    native = _load()
    if isinstance(native, str):
        if mode == "c":
            raise KernelError(f"{MODE}=c, and {native}. To have it: {BUILD}; or set {MODE}=auto.")
        return Choice("torch", "", native, mode=mode)
    instructions = native.stompp_choose(cpu.encode()).decode()
    limit = f", {LIMIT}={cpu}" if cpu else ""
    return Choice("c", instructions, f"{MODE}={mode}{limit}, on {platform.machine()}", native, mode)


def library_path() -> Path | None:
    """The compiled part's file, or None."""
    here = Path(__file__).parent
    paths = (here / f"_native{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def _load() -> ctypes.CDLL | str:
    """The compiled part, or why there is none."""
    path = library_path()
    if path is None:
        return "the compiled part was not built (no C compiler when this was installed, or a checkout without a build)"
    try:
        native = ctypes.CDLL(str(path))
        version = native.stompp_version()
        if version != VERSION:
            return f"{path.name} was built from other sources (version {version}, not {VERSION}): build it again"
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(native, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be loaded: {error}"
    for name, quick in _functions_of_python(path).items():
        setattr(native, name, quick)
    native.stompp_set_team(_team())
    return native


def _functions_of_python(path: Path) -> dict[str, Any]:
    """Functions of the same names that spare the cost of ctypes; and stompp_whole_call, which takes objects.

    None of them if built without Python's headers.

    They hold Python's lock while there is so little to do that handing it over would take longer.
    """
    loader = importlib.machinery.ExtensionFileLoader(f"{__package__}._native", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    try:
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        loader.exec_module(module)
    except ImportError:
        return {}
    return {name: function for name, function in vars(module).items() if name.startswith("stompp_")}


def _team() -> int | None:
    """The function of torch's own OpenMP that runs a team of threads, where it can be found."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, c_void_p).value
    except (OSError, AttributeError, TypeError):  # TypeError: Windows
        return None


def describe() -> str:
    """Lines that say what is used and why."""
    chosen = choice()
    path = library_path()
    lines = [
        f"kernels       {chosen.used}{' with ' + chosen.instructions if chosen.instructions else ''}",
        f"because       {chosen.reason}",
        f"compiled part {path.name if path else 'none'}",
    ]
    if chosen.used == "c":
        lines.append(f"threads       {'of torch' if _team() else 'made for each call'}")
    return "\n".join(lines)

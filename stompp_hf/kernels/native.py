"""The compiled part: where it is, whether it can be used, and with which instructions of this CPU.

STOMPP_KERNELS=torch|c|triton|auto   plain torch; compiled, or an error; Triton for tensors on a GPU, or an error (C as
    with auto); what is there (the default: of either kind)
STOMPP_KERNELS_CPU=portable|avx2|avx512|neon   instructions that may be used at most; by default the best of this CPU
"""

import ctypes
import importlib.machinery
import importlib.util
import platform
from ctypes import POINTER, c_char_p, c_int, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import KernelError

MODE, LIMIT = "STOMPP_KERNELS", "STOMPP_KERNELS_CPU"
MODES, LIMITS = ("auto", "torch", "c", "triton"), ("", "portable", "avx2", "avx512", "neon")
VERSION = 10
"""STOMPP_VERSION of the sources that these calls belong to."""
BUILD = "pip install --force-reinstall --no-deps --no-cache-dir stompp-hf (in a checkout: pip install -e .)"


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
    "stompp_lane_linear": (c_int, (*[c_void_p] * 3, c_int64, c_void_p, c_int64, c_void_p, *[c_int64] * 3, c_int)),
    "stompp_unpack": (None, (c_void_p, c_int64, c_int64, c_void_p)),
    "stompp_tap_words": (None, (c_void_p, c_int64, c_int64, c_int64, c_void_p)),
    "stompp_pack": (None, (c_void_p, c_int64, c_int64, c_int, c_void_p, c_int)),
    "stompp_attention_panels": (c_int64, (c_void_p,)),
    "stompp_attention_blocks": (c_int64, (c_void_p,)),
    "stompp_attention_rows": (c_int64, (c_void_p, c_int64)),
    "stompp_attention_pack": (c_int, (c_void_p, c_int)),
    "stompp_attention_scores": (c_int, (c_void_p, c_int64, c_int64, c_void_p, c_int)),
    "stompp_attention_values": (c_int, (c_void_p, c_int64, c_int64, c_void_p, c_int)),
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


def choice_of(mode: str, cpu: str) -> Choice:
    """What is used with this mode, one of MODES, and this limit, one of LIMITS."""
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
        return (
            f"the compiled part was not built in {Path(__file__).parent}: no C compiler when this was installed, or a "
            "clone, which hides an installed copy from a Python that starts in it (pip install -e . builds it there)"
        )
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
    native.stompp_set_team(team())
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


def team() -> int | None:
    """The function of torch's own OpenMP that runs a team of threads, where it can be found."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, c_void_p).value
    except (OSError, AttributeError, TypeError):  # TypeError: Windows
        return None

"""Linear layers by Triton against plain torch: in Triton's interpreter, compiled for GPUs without one, and on one."""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from test_kernels import DTYPES, SPECIAL, numbers
from torch import Tensor, nn

from stompp_hf import StoMPPConfig, kernels
from stompp_hf.checkpoints.packing import pack_members
from stompp_hf.cli import main
from stompp_hf.errors import KernelError, ShapeError
from stompp_hf.inference.fused_layers import fuse
from stompp_hf.kernels import choosing, gpu, native
from stompp_hf.method.layer_product import LinearProduct
from stompp_hf.method.packed_product import packed_forward, packed_reference
from stompp_hf.method.sign_bits import SignBits, pack_signs
from stompp_hf.modules import BinaryLinear

THERE = importlib.util.find_spec("triton") is not None
INTERPRETED = THERE and os.environ.get("TRITON_INTERPRET") == "1"
PAIR = settings(max_examples=25, deadline=None)


def interpreted(test: Callable[..., None]) -> Any:
    """Marks what runs in the interpreter."""
    marked = pytest.mark.skipif(not INTERPRETED, reason="needs triton, and TRITON_INTERPRET=1")(test)
    return pytest.mark.triton(marked)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter takes tensors of a CPU; compiled C is not there to take them before it."""
    monkeypatch.setattr(gpu, "DEVICES", ("cpu",))
    monkeypatch.setattr(native, "library_path", lambda: None)
    kernels.use("triton")
    yield
    monkeypatch.undo()
    kernels.use()


def reference(
    x: Tensor, threshold: Tensor | None, bits: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What plain torch gives."""
    signs = SignBits(bits, torch.Size((bits.shape[0], x.shape[-1])))
    before = kernels.choice().mode
    try:
        kernels.use("torch")
        return packed_reference(x, threshold, True, signs, (scale, shift), dtype, LinearProduct(), 0.0)
    finally:
        kernels.use(before)


def truncated(y: Tensor) -> Tensor:
    """bfloat16 as the interpreter makes it; GPUs round to the nearest, as the test of what is compiled finds."""
    return (y.float().view(torch.int32) & -(2**16)).view(torch.float32).bfloat16()


# ---- in the interpreter ----


@interpreted
@given(
    st.one_of(st.integers(1, 20), st.integers(60, 130)), st.one_of(st.integers(1, 200), st.integers(500, 1200)),
    st.integers(1, 150), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.booleans(),
    st.sampled_from(["channel", "single", "scale", "none"]), st.integers(0, 9),
)  # fmt: skip
@PAIR
def test_outputs_are_those_of_torch(
    rows: int, inner: int, outer: int, taken: torch.dtype, given: torch.dtype, above: bool, kind: str, seed: int
) -> None:
    x, w, b = numbers((rows, inner), seed, taken), numbers((outer, inner), seed + 1), numbers((inner,), seed + 2)
    x[0] = b.to(taken)  # differences of exactly zero
    count = outer if kind == "channel" else 1
    scale = None if kind == "none" else numbers((count,), 3)
    shift = numbers((count,), 4) if kind in ("channel", "single") else None
    operands = x, b if above else None, pack_signs(w), scale, shift
    y, half = gpu.linear(*operands, given), given == torch.bfloat16
    expected = truncated(reference(*operands, torch.float32)) if half else reference(*operands, given)
    assert y.dtype == given and torch.equal(y, expected)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan_have_the_signs_that_torch_gives_them(dtype: torch.dtype) -> None:
    x, b = (t.flatten() for t in torch.meshgrid(SPECIAL, SPECIAL, indexing="ij"))
    x, b = x[~b.isnan()].to(dtype), b[~b.isnan()]
    bits = pack_signs(torch.eye(x.numel()) - 0.5)  # each output tells one input's sign from the sum of all
    for threshold in (b, None):
        operands = x[None], threshold, bits, None, None, torch.float32
        assert torch.equal(gpu.linear(*operands), reference(*operands))


@interpreted
def test_weights_whose_rows_are_whole_words_are_not_copied() -> None:
    from stompp_hf.kernels import triton_linear

    whole, ragged = pack_signs(numbers((9, 96), 0)), pack_signs(numbers((9, 40), 0))
    assert triton_linear._weight_words(whole).data_ptr() == whole.data_ptr()
    for bits in (ragged, pack_signs(numbers((3, 96), 0)).t().contiguous().t(), pack_signs(numbers((2, 104), 0))[:, 1:]):
        x = numbers((2, 8 * bits.shape[1]), 1)
        assert torch.equal(
            gpu.linear(x, None, bits, None, None, torch.float32), reference(x, None, bits, None, None, torch.float32)
        )
    ragged ^= 1  # what was made of it is made again
    x = numbers((2, 40), 1)
    assert torch.equal(
        gpu.linear(x, None, ragged, None, None, torch.float32), reference(x, None, ragged, None, None, torch.float32)
    )


@interpreted
def test_packed_layers_take_it(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = BinaryLinear.convert(nn.Linear(70, 90), StoMPPConfig())
    x = numbers((3, 5, 70), 0)
    layer.calibrate_weight()
    layer.calibrate_activation(x.flatten(0, 1))
    layer.enter("frozen", 1.0)
    expected = layer(x).detach()
    pack_members({"layer": layer})
    calls: list[int] = []
    linear = gpu.linear
    monkeypatch.setattr(gpu, "linear", lambda *a: calls.append(1) or linear(*a))
    assert torch.equal(layer(x), expected) and len(calls) == 1  # with gradients: the sums alone
    with torch.no_grad():
        assert torch.equal(layer(x), expected) and len(calls) == 2
        fuse(layer, *layer.scale_and_shift())
        assert torch.equal(layer(x), expected) and len(calls) == 3
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), expected) and len(calls) == 4
        kernels.use("torch")
        assert torch.equal(layer(x), expected) and len(calls) == 4


@interpreted
def test_graphs_know_on_which_device_it_is_used(on_cpu: None) -> None:
    choose = torch.compile(lambda x: x + choosing.used_on_gpu(x.device), backend="eager", fullgraph=True)
    assert choose(torch.zeros(1)).item() == 1.0
    kernels.use("torch")
    torch.compiler.reset()
    assert choose(torch.zeros(1)).item() == 0.0


# ---- compiled, for GPUs that are not there ----

COMPILED = """if True:
    import re
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from stompp_hf.kernels import triton_linear as kernels

    def ptx_of(kernel, arguments, values, arch):
        names = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
        source = ASTSource(kernel, names, values)
        made = compile(source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": False})
        assert made.asm["cubin"]
        return made.asm["ptx"]

    for arch, rows in ((80, 1), (90, 100)):
        numbers = {name: "i32" for name in "MNKW"}
        values = {"ROWS": 4, "WORDS": 8}
        pointers = {"x": "*fp16", "threshold": "*fp32", "words": "*i32"}
        text = ptx_of(kernels.sign_words, {**numbers, **pointers}, values, arch)
        assert re.search(r"add\\S*\\.f32", text) and re.search(r"sub\\S*\\.f32", text), "x + 0 - b"
        pointers = {"words": "*i32", "weights": "*i32", "scale": "*fp32", "shift": "*fp32", "y": "*bf16"}
        values = {"SCALE_STEP": 1, "SHIFT_STEP": 1, **kernels.blocks_for(rows)}
        text = ptx_of(kernels.product, {**numbers, **pointers}, values, arch)
        assert "fma." not in text and re.search(r"mul\\S*\\.f32", text), "rounded twice"
        assert "cvt.rn.bf16" in text, "rounded to the nearest"
        assert ("popc" if rows == 1 else "s32.s8.s8") in text
    print("compiled")
"""


@pytest.mark.triton
@pytest.mark.skipif(not THERE, reason="needs triton")
def test_what_is_compiled_rounds_as_torch_does(tmp_path: Path) -> None:
    script = tmp_path / "script.py"  # Triton reads the source of its kernels from files
    script.write_text(COMPILED)
    root = Path(__file__).parent.parent
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0 and "compiled" in result.stdout, result.stdout + result.stderr


# ---- whether it is used ----


def test_what_is_used_on_a_gpu_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def said(mode: str) -> str:
        kernels.use(mode)
        assert main(["env"]) == 0
        return capsys.readouterr().out.splitlines()[-1]

    try:
        assert "torch: STOMPP_KERNELS=torch" in said("torch")
        monkeypatch.setattr(choosing, "triton_version", lambda: None)
        assert "torch: triton cannot be imported" in said("auto")
        assert not choosing.used_on_gpu(torch.device("cuda"))
        monkeypatch.setattr(choosing, "triton_version", lambda: "3.9.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "there is no GPU (triton 3.9.0 is there)" in said("auto")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert "triton: triton 3.9.0 is there" in said("auto")
        assert choosing.used_on_gpu(torch.device("cuda")) and not choosing.used_on_gpu(torch.device("cpu"))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(KernelError, match=r"STOMPP_KERNELS=triton, and triton is not installed.*=auto"):
            kernels.use("triton")
    finally:
        monkeypatch.undo()
        kernels.use()


def test_sizes_that_do_not_fit_never_reach_triton() -> None:
    with pytest.raises(ShapeError, match="do not fit"):
        gpu.linear(torch.ones(2, 20), None, torch.zeros(4, 2, dtype=torch.uint8), None, None, torch.float32)


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not THERE or not torch.cuda.is_available(), reason="needs a GPU and triton")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner,outer", [(768, 3072), (3072, 768), (333, 77)])
def test_a_gpu_gives_what_torch_gives_there(inner: int, outer: int, dtype: torch.dtype) -> None:
    """Prints ms of plain torch with real weights, and of the kernel (python -m pytest -m gpu -s)."""
    w, b, scale, shift = (numbers(shape, 1).cuda() for shape in ((outer, inner), (inner,), (outer,), (outer,)))
    bits = pack_signs(w)
    signs, plain = SignBits(bits, w.shape), w.to(dtype)
    for rows in (1, 7, 16, 128, 2048):
        x = numbers((rows, inner), 0, dtype).cuda()
        x[0], x[:, :2] = b.to(dtype), torch.tensor([float("nan"), float("inf")])
        for threshold in (b, None):
            expected = reference(x, threshold, bits, scale, shift, dtype)
            y = packed_forward(x, threshold, signs, (scale, shift), dtype, LinearProduct(), 0.0)
            assert y is not None and torch.equal(y, expected)
        times = [
            milliseconds(lambda x=x: nn.functional.linear(x, plain)),
            milliseconds(lambda x=x: gpu.linear(x, b, bits, scale, shift, dtype)),
        ]
        print(f"\n{inner} to {outer}, {rows} rows, {dtype}: torch {times[0]:.3f} ms, packed {times[1]:.3f} ms", end="")


def milliseconds(call: Callable[[], Any], repeats: int = 20) -> float:
    """The least of some calls."""
    call()
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return 1e3 * min(found)

"""Compiled products against sums in float64 and against plain torch, for each set of instructions of this CPU."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from instruction_sets import limited_to
from torch import Tensor
from torch.nn import functional as F

from stompp_hf import kernels
from stompp_hf.cli import main
from stompp_hf.errors import KernelError, ShapeError
from stompp_hf.kernels import native
from stompp_hf.method.conv_product import ConvProduct
from stompp_hf.method.layer_product import LinearProduct
from stompp_hf.method.mixing import hard_above
from stompp_hf.method.packed_product import packed_forward
from stompp_hf.method.sign_bits import SignBits, pack_signs

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "stompp_hf" / "kernels" / "csrc"
BUILT = native.library_path() is not None
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

compiled = pytest.mark.skipif(not BUILT, reason="the compiled part was not built")
manual = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["portable", "avx2", "avx512", "neon"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each set of instructions in turn."""
    yield from limited_to(request.param)


def numbers(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal, with zeros of both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(shape, generator=generator)
    zero = torch.rand(shape, generator=generator) < 0.2
    return torch.where(zero, torch.copysign(torch.zeros_like(u), u), u).to(dtype)


def integer_signs(x: Tensor) -> np.ndarray:
    """sign(x) by numpy alone."""
    return np.where(x.double().numpy() >= 0, 1.0, -1.0)


@compiled
def test_the_inner_loop_alone_says_what_it_did(instructions: str) -> None:
    """48 rows by 64 lanes of 1024 signs a round: what a benchmark takes for the ceiling."""
    assert kernels.inner_loop(0) == 0
    assert kernels.inner_loop(5) == 5 * kernels.inner_loop(1) == 5 * 48 * 64 * 1024


# ---- linear layers ----


@compiled
@given(
    st.integers(1, 70), st.one_of(st.integers(1, 300), st.integers(1, 20_000)), st.integers(1, 200), st.integers(0, 9)
)
@manual
def test_linear_sums_are_the_whole_numbers(instructions: str, rows: int, inner: int, outer: int, seed: int) -> None:
    x, w = numbers((rows, inner), seed), numbers((outer, inner), seed + 1)
    z = kernels.linear(x, None, pack_signs(w), None, None, torch.float32)
    assert np.array_equal(z.double().numpy(), integer_signs(x) @ integer_signs(w).T)


@compiled
@given(
    st.integers(1, 9), st.integers(1, 200), st.integers(1, 150), st.sampled_from(DTYPES), st.sampled_from(DTYPES),
    st.sampled_from(["channel", "single", "none"]), st.integers(0, 9),
)  # fmt: skip
@manual
def test_linear_outputs_are_those_of_torch(
    instructions: str, rows: int, inner: int, outer: int, taken: torch.dtype, given: torch.dtype, kind: str, seed: int
) -> None:
    x, w, b = numbers((rows, inner), seed, taken), numbers((outer, inner), seed + 1), numbers((inner,), seed + 2)
    x[0] = b.to(taken)  # differences of exactly zero
    count = outer if kind == "channel" else 1
    scale, shift = (None, None) if kind == "none" else (numbers((count,), 3), numbers((count,), 4))
    z = F.linear(hard_above(x.float(), b), hard_above(w, None))
    expected = z if scale is None else z * scale + shift
    y = kernels.linear(x, b, pack_signs(w), scale, shift, given)
    assert y.dtype == given and torch.equal(y, expected.to(given))


SPECIAL = torch.tensor(
    [float("nan"), -float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-45, 6e-8, -6e-8, 3e38, -3e38, 1.0]
)
"""With what a dtype makes of them; 6e-8 is subnormal in float16, and 3e38 infinite."""


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan_have_the_signs_that_torch_gives_them(instructions: str, dtype: torch.dtype) -> None:
    x, b = (t.flatten() for t in torch.meshgrid(SPECIAL, SPECIAL, indexing="ij"))
    x, b = x[~b.isnan()].to(dtype), b[~b.isnan()]  # compilers are free in the sign that a NaN gets from negation
    if torch.copysign(torch.ones(1), torch.tensor([-float("nan")]).to(dtype).float()).item() > 0:
        x, b = x[~x.isnan()], b[~x.isnan()]  # a CPU without F16C: torch drops the sign of a NaN in float16
    eye = torch.eye(x.numel()) - 0.5  # each output tells one input's sign from the sum of all
    for threshold in (b, None):
        expected = F.linear(hard_above(x.float(), threshold), hard_above(eye, None))
        assert torch.equal(kernels.linear(x[None], threshold, pack_signs(eye), None, None, torch.float32)[0], expected)
        product = ConvProduct((1,), ((0, 0),), (1,), 1)
        signs = SignBits.of(eye[:, :, None], 0)
        y = product.by_kernel(x[None, :, None], threshold, signs, (None, None), torch.float32, 0.0)
        assert y is not None and torch.equal(y[0, :, 0], expected)
        single = ConvProduct((1,), ((0, 0),), (1,), x.numel())
        ones = SignBits.of(torch.ones(x.numel(), 1, 1), 0)
        y = single.by_kernel(x[None, :, None], threshold, ones, (None, None), torch.float32, 0.0)
        assert y is not None and torch.equal(y[0, :, 0], hard_above(x.float(), threshold))


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_that_a_half_cannot_hold(instructions: str, dtype: torch.dtype) -> None:
    scale = torch.cat([SPECIAL, torch.logspace(-46, 38, 4000), torch.tensor([65519.99, 65520.0])])
    y = kernels.linear(torch.ones(1, 1), None, pack_signs(torch.ones(len(scale), 1)), scale, None, dtype)[0]
    expected = scale.to(dtype)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0))


@compiled
def test_threads_change_nothing(instructions: str) -> None:
    x, w = numbers((300, 700), 0), numbers((260, 700), 1)
    images, kernel = numbers((2, 40, 30, 30), 2), numbers((70, 40, 3, 3), 3)
    product = ConvProduct((1, 1), ((1, 1), (1, 1)), (1, 1), 1)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        y = kernels.linear(x, None, pack_signs(w), None, None, torch.float32)
        z = product.by_kernel(images, None, SignBits.of(kernel, 0), (None, None), torch.float32, 0.0)
        found.append((y, z))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))
    assert np.array_equal(found[0][0].double().numpy(), integer_signs(x) @ integer_signs(w).T)


# ---- convolutions ----


@st.composite
def convolutions(draw: Any) -> tuple[ConvProduct, Tensor, Tensor]:
    """A product of any geometry, an input, and a weight."""
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    inner, outer = draw(st.sampled_from([1, 2, 7, 8, 31, 33, 64, 70])), draw(st.integers(1, 9))
    kernel = [draw(st.integers(1, 4)) for _ in range(dims)]
    stride, dilation = (tuple(draw(st.integers(1, 3)) for _ in range(dims)) for _ in range(2))
    padding = tuple((draw(st.integers(0, 4)), draw(st.integers(0, 4))) for _ in range(dims))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = [max(draw(st.integers(1, 9)), r - sum(p)) for r, p in zip(reach, padding, strict=True)]
    size[-1] += draw(st.sampled_from([0, 0, 60]))
    seed = draw(st.integers(0, 9))
    x = numbers((draw(st.integers(1, 2)), groups * inner, *size), seed)
    return ConvProduct(stride, padding, dilation, groups), x, numbers((groups * outer, inner, *kernel), seed + 1)


@compiled
@given(convolutions(), st.sampled_from([-1.0, 0.0, 1.0]), st.sampled_from(DTYPES), st.booleans(), st.booleans())
@manual
def test_convolutions_are_those_of_torch(
    instructions: str,
    case: tuple[ConvProduct, Tensor, Tensor],
    pad: float,
    dtype: torch.dtype,
    last: bool,
    affine: bool,
) -> None:
    product, x, w = case
    x = x.to(dtype)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if last and x.dim() in formats:
        x = x.contiguous(memory_format=formats[x.dim()])
    b, scale, shift = numbers((x.shape[1],), 2), numbers((w.shape[0],), 3), numbers((w.shape[0],), 4)
    operand = hard_above(x.double(), product.per_feature(b.double(), x))
    z = product(operand, hard_above(w.double(), None), pad).round()
    expected = (z.float() * product.per_channel(scale, z) + product.per_channel(shift, z)).to(dtype)
    given = (scale, shift) if affine else (None, None)
    y = product.by_kernel(x, b, SignBits.of(w, 0), given, dtype if affine else torch.float32, pad)
    assert y is not None and torch.equal(y, expected if affine else z.float())
    shaped = product(hard_above(x.float(), None), hard_above(w, None), pad)
    assert min(y.shape) == 1 or y.stride() == shaped.stride()  # strides of single entries mean nothing


@compiled
def test_words_of_taps_follow_the_bits() -> None:
    product = ConvProduct((1, 1), ((1, 1), (1, 1)), (1, 1), 1)
    x, w = numbers((1, 40, 8, 8), 0), numbers((5, 40, 3, 3), 1)
    bits = SignBits.of(w, 0)
    for weight in (w, -w - 0.1):
        bits.bits.copy_(SignBits.of(weight, 0).bits)
        y = product.by_kernel(x, None, bits, (None, None), torch.float32, 0.0)
        assert y is not None and torch.equal(y, product(hard_above(x, None), hard_above(weight, None)))


# ---- what is used, and why ----


def test_what_is_used_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert kernels.use("torch").used == "torch"
        assert main(["env"]) == 0
        assert "torch" in (out := capsys.readouterr().out) and "STOMPP_KERNELS=torch" in out
        for name, value in (("STOMPP_KERNELS", "cuda"), ("STOMPP_KERNELS_CPU", "sse")):
            with monkeypatch.context() as patch, pytest.raises(KernelError, match=f"{name} is '{value}', and must be"):
                patch.setenv(name, value)
                kernels.use()
        monkeypatch.setattr(native, "library_path", lambda: None)
        assert kernels.use("auto").used == "torch" and "not built" in kernels.choice().reason
        with pytest.raises(KernelError, match=r"STOMPP_KERNELS=c, and .*not built.* To have it: pip install"):
            kernels.use("c")
        monkeypatch.setattr(native, "library_path", lambda: Path(__file__))
        assert "cannot be loaded" in kernels.use("auto").reason
    finally:
        monkeypatch.undo()
        kernels.use()


@compiled
def test_a_build_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "VERSION", -1)
    try:
        assert "other sources" in kernels.use("auto").reason
    finally:
        monkeypatch.undo()
        kernels.use()


@compiled
def test_the_environment_decides() -> None:
    """In a process of its own: no AVX2, and threads of its own where torch's cannot be found."""
    script = """if True:
        import torch
        from stompp_hf import kernels
        from stompp_hf.kernels import native
        assert kernels.choice().instructions == "portable", kernels.describe()
        native.team = lambda: None
        kernels.use()
        torch.set_num_threads(3)
        x, w = torch.randn(200, 500), torch.randn(300, 500)
        y = kernels.linear(x, None, torch.zeros(300, 63, dtype=torch.uint8), None, None, torch.float32)
        assert torch.equal(y, -torch.where(x >= 0, 1.0, -1.0).sum(1, keepdim=True).expand(200, 300))
        print(kernels.describe())"""
    env = {**os.environ, "STOMPP_KERNELS": "c", "STOMPP_KERNELS_CPU": "portable", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    assert "c with portable" in result.stdout and "made for each call" in result.stdout


@compiled
def test_sizes_that_do_not_fit_never_reach_c() -> None:
    x, bits = torch.ones(2, 20), torch.zeros(4, 3, dtype=torch.uint8)
    one = torch.ones(3)
    for arguments in ((one, bits, None, None), (None, bits, one, None), (None, bits, None, one.double()),
                      (None, bits[:, :2], None, None), (None, bits.int(), None, None)):  # fmt: skip
        with pytest.raises(ShapeError, match="do not fit"):
            kernels.linear(x, *arguments, torch.float32)
    for images, groups in ((torch.ones(1, 5, 9), 2), (torch.ones(1, 6, 9), 3), (torch.ones(1, 6, 9, 9), 1)):
        few = torch.zeros(4, -(-(images.shape[1] // groups * 3) // 8), dtype=torch.uint8)
        with pytest.raises(ShapeError, match="does not fit"):
            kernels.conv(images, None, few, None, None, torch.float32, [3], [1], [(0, 0)], [1], groups, 0)
    product = LinearProduct()
    signs = SignBits(bits, torch.Size((4, 21)))
    assert product.by_kernel(x, None, signs, (None, None), torch.float32, 0.0) is None  # torch says what is wrong
    narrow = ConvProduct((1,), ((0, 0),), (1,), 1)
    weight = SignBits.of(torch.ones(2, 3, 4), 0)
    for wrong in (torch.ones(1, 4, 9), torch.ones(1, 3, 3), torch.ones(3)):
        assert narrow.by_kernel(wrong, None, weight, (None, None), torch.float32, 0.0) is None


# ---- operators ----

OPERATORS = {
    "linear": (LinearProduct(), (3, 40), (9, 40), 0.0),
    "conv": (ConvProduct((2, 1), ((1, 2), (0, 1)), (1, 2), 2), (2, 4, 9, 9), (6, 2, 3, 2), 0.0),
    "reflected": (ConvProduct((1,), ((1, 1),), (1,), 1, "reflect"), (2, 4, 9), (6, 4, 3), 0.0),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_in_graphs(name: str, dtype: torch.dtype) -> None:
    product, shape, weight, pad = OPERATORS[name]
    x, signs = numbers(shape, 0, dtype), SignBits.of(numbers(weight, 1), 0)
    affine = numbers((weight[0],), 2), numbers((weight[0],), 3)
    b = numbers((product.features(torch.empty(weight)),), 4)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = packed_forward(x, b, signs, affine, dtype, product, pad)
            assert y is not None
            return y

    operand = hard_above(x.float(), product.per_feature(b, x))
    z = product(operand, signs.signs(torch.float32), pad)
    expected = (z * product.per_channel(affine[0], z) + product.per_channel(affine[1], z)).to(dtype)
    with torch.no_grad():
        exported = torch.export.export(Layer(), (x,))
        assert any("stompp_hf" in str(node.target) for node in exported.graph.nodes)
        assert torch.equal(exported.module()(x), expected)
        torch.compiler.reset()
        assert torch.equal(torch.compile(Layer(), backend="aot_eager", fullgraph=True)(x), expected)
        kernels.use("torch")
        assert torch.equal(exported.module()(x), expected)
        kernels.use()


def test_operators_pass_their_checks() -> None:
    bits = pack_signs(numbers((9, 40), 0))
    b, scale, shift = numbers((40,), 1), numbers((9,), 2), numbers((1,), 3)
    torch.library.opcheck(
        torch.ops.stompp_hf.packed_linear, (numbers((3, 40), 4), b, bits, scale, shift, torch.bfloat16)
    )
    torch.library.opcheck(
        torch.ops.stompp_hf.packed_linear, (numbers((2, 3, 40), 4), None, bits, None, None, torch.float32)
    )
    weight = pack_signs(numbers((6, 2 * 9), 0))
    sizes = ([3, 3], [2, 1], [1, 1, 0, 1], [1, 1], 2, 0)
    for x in (numbers((2, 4, 9, 9), 4), numbers((2, 4, 9, 9), 4).contiguous(memory_format=torch.channels_last)):
        torch.library.opcheck(
            torch.ops.stompp_hf.packed_conv, (x, b[:4], weight, scale[:6], shift, torch.float32, *sizes)
        )


@compiled
@pytest.mark.parametrize("features", [1, 2, 15, 16, 17, 18, 31, 32, 33, 48, 70, 100, 333])
def test_real_inputs_are_summed_in_lanes(instructions: str, features: int) -> None:
    """In the order that kernels.h tells, with numpy's float32 one number after another."""
    generator = torch.Generator().manual_seed(features)
    x, w = (torch.randn(n, features, generator=generator) for n in (2, 69))
    scale, shift = torch.rand(69, generator=generator), torch.randn(69, generator=generator)
    signs, bits = integer_signs(w).astype(np.float32), pack_signs(w)
    expected = np.zeros((2, 69), np.float32)
    for m, n in np.ndindex(2, 69):
        terms, whole = x[m].numpy() * signs[n], 1 + (features - 1) // 16 * 16
        lanes = np.zeros(16, np.float32)
        lanes[0] = terms[0]
        for chunk in terms[1:whole].reshape(-1, 16):
            lanes += chunk
        total = folded(lanes)
        if features > whole:
            lanes = np.zeros(16, np.float32)
            lanes[0] = total
            lanes[: features - whole] += terms[whole:]
            total = folded(lanes)
        expected[m, n] = total * scale[n].numpy() + shift[n].numpy()
    assert torch.equal(kernels.lane_linear(x, bits, scale, shift), torch.from_numpy(expected))
    assert np.array_equal(kernels.unpack(bits, features).numpy(), signs)


def folded(lanes: np.ndarray) -> np.float32:
    """The sum of lanes, the upper half added to the lower."""
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return np.float32(lanes[0])


# ---- sanitizers and installation ----

COMPILER = shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
C11 = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-pthread", f"-I{SOURCES}"]
FUZZERS = ("kernels_fuzz.c", "training_fuzz.c")
FUZZED = [*C11, "-DPRODUCTS_A_THREAD=256"]
"""Small products are shared among threads as well."""
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


@needs_compiler
def test_the_sources_give_no_warnings() -> None:
    command = [str(COMPILER), "-fsyntax-only", *C11, *map(str, sorted(SOURCES.glob("*.c")))]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("fuzz", FUZZERS)
def test_sanitizers_find_nothing(tmp_path: Path, fuzz: str) -> None:
    program = tmp_path / "fuzz"
    sources = [ROOT / "tests" / fuzz, *sorted(SOURCES.glob("*.c"))]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command = [str(COMPILER), "-O1", "-g", *FUZZED, *sanitizers, *map(str, sources), "-o", str(program), "-lm"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in built.stderr:
        pytest.skip("this compiler comes without sanitizers")
    assert built.returncode == 0, built.stderr
    for seed in range(3):
        result = subprocess.run([program, str(seed), "100"], capture_output=True, text=True, check=False)
        assert result.returncode == 0 and "entries equal" in result.stdout, result.stdout + result.stderr


def cross_compiler() -> list[str] | None:
    """A compiler for ARM64 on Linux: gcc's, or zig's (pip install ziglang)."""
    found = next(
        (path for name in ("gcc", "gcc-12", "gcc-13") if (path := shutil.which(f"aarch64-linux-gnu-{name}"))), None
    )
    if found is not None:
        return [found]
    zig = ["zig"] if shutil.which("zig") else [sys.executable, "-m", "ziglang"] if find_spec("ziglang") else None
    return None if zig is None else [*zig, "cc", "-target", "aarch64-linux-musl"]


@pytest.mark.slow
@pytest.mark.parametrize("fuzz", FUZZERS)
def test_neon_computes_the_same_in_an_emulator(tmp_path: Path, fuzz: str) -> None:
    compiler = cross_compiler()
    emulator = next((path for name in ("", "-static") if (path := shutil.which(f"qemu-aarch64{name}"))), None)
    if compiler is None or emulator is None:
        pytest.skip("needs qemu-aarch64 (Debian: qemu-user-static) and aarch64-linux-gnu-gcc or zig")
    program = tmp_path / "fuzz"
    sources = [ROOT / "tests" / fuzz, *sorted(SOURCES.glob("*.c"))]
    options = [*FUZZED, "-O2", "-static"]
    subprocess.run([*compiler, *options, *map(str, sources), "-o", program, "-lm"], check=True)
    for seed in range(3):
        result = subprocess.run([emulator, program, str(seed), "30"], capture_output=True, text=True, check=False)
        assert result.returncode == 0 and "at best with neon" in result.stdout, result.stdout + result.stderr


FALL_BACK = """
import torch
from stompp_hf import kernels
print(kernels.describe())
x, bits, scale = torch.randn(5, 70), torch.randint(0, 256, (33, 9), dtype=torch.uint8), torch.rand(33)
bits[:, 8] &= 63
y = kernels.linear(x, None, bits, scale, None, torch.float32)
signs = kernels.unpack(bits, 70)
assert torch.equal(y, torch.copysign(torch.ones(()), x) @ signs.T * scale)
"""


@pytest.mark.slow
def test_a_cpu_without_avx2_falls_back_in_an_emulator() -> None:
    """What was built here, on a CPU of 2008: a minute or more, for torch is slow to come up there."""
    emulator = next((path for name in ("", "-static") if (path := shutil.which(f"qemu-x86_64{name}"))), None)
    if emulator is None or platform.machine() != "x86_64" or kernels.native.library_path() is None:
        pytest.skip("needs qemu-x86_64 (Debian: qemu-user-static) and the compiled part")
    command = [emulator, "-cpu", "Nehalem", sys.executable, "-c", FALL_BACK]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "STOMPP_KERNELS": "auto"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "c with portable" in result.stdout, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [COMPILER, "/bin/false"])
def test_it_installs_with_and_without_a_compiler(tmp_path: Path, compiler: str | None) -> None:
    if compiler is None:
        pytest.skip("no C compiler")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.so", "build", "dist", "*.egg-info", ".*", "runs", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    target = tmp_path / "site"
    env = {**os.environ, "CC": compiler}
    subprocess.run([*command, "--target", target, source], check=True, env=env, capture_output=True)
    env = {**os.environ, "PYTHONPATH": str(target), "STOMPP_KERNELS": "auto"}
    result = subprocess.run(
        [sys.executable, "-m", "stompp_hf", "env"], check=True, env=env, capture_output=True, text=True, cwd=tmp_path
    )
    assert ("was not built" in result.stdout) == (compiler == "/bin/false"), result.stdout
    assert ("kernels       c" in result.stdout) == (compiler != "/bin/false")

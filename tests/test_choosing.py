"""One chooser: where somebody listens to torch's operations no kernel is called, and the numbers are the same."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import stompp_hf
from stompp_hf import (
    Progression,
    StoMPPConfig,
    binarize_model,
    calibrate,
    fuse_for_inference,
    kernels,
    pack_model,
)
from stompp_hf.errors import StoMPPError
from stompp_hf.integrations.torch import QUESTIONS, is_watched
from stompp_hf.kernels import Route, choosing

STATES = ("frozen", "packed", "fused")


class Watching(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Passing(TorchFunctionMode):
    """Sees functions, and lets them pass."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Blocks(nn.Module):
    """Convolutions with BatchNorms and a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool, self.head = nn.Conv2d(3, 16, 3), nn.MaxPool2d(2), nn.Linear(16, 2)
        self.layers = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.stem(x))
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = torch.relu(norm(layer(x))) + x
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def plain(kind: str) -> tuple[nn.Module, torch.Tensor]:
    """A small model and a batch."""
    if kind == "conv":
        return Blocks(), torch.randn(4, 3, 12, 12)
    if kind == "embedding":
        table = nn.Embedding(20, 32)
        return nn.Sequential(table, nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 2)), torch.randint(20, (4, 5))
    return nn.Sequential(*(nn.Linear(n, m) for n, m in ((8, 32), (32, 32), (32, 32), (32, 2)))), torch.randn(4, 8)


def finished(kind: str, state: str, seed: int = 0) -> tuple[Any, torch.Tensor]:
    """A frozen, packed or fused model in evaluation, and another batch than it was calibrated on."""
    torch.manual_seed(seed)
    net, x = plain(kind)
    options = {"embedding": {"embeddings": "binarize"}, "real": {"binarize": "weights"}}.get(kind, {})
    model: Any = binarize_model(net.eval(), StoMPPConfig(**options), example_inputs=x)
    Progression(model, 4).step(4)
    calibrate(model, [(x,)])
    model.eval()
    if state != "frozen":
        pack_model(model)
    if state == "fused":
        fuse_for_inference(model, x)
    return model, torch.cat([x, x.flip(0)])[1:]


every = pytest.mark.parametrize("kind", ["linear", "real", "conv", "embedding"])
states = pytest.mark.parametrize("state", STATES)


def agrees(kind: str, state: str) -> Callable[[torch.Tensor, torch.Tensor], bool]:
    """Bit for bit; but sums of real inputs that were fused are in another order."""
    return torch.allclose if (kind, state) == ("real", "fused") else torch.equal


# ---- graphs ----


@every
@states
@pytest.mark.parametrize("grad", [False, True])
def test_traced_models_give_their_numbers_and_can_be_saved(kind: str, state: str, grad: bool) -> None:
    model, x = finished(kind, state)
    with torch.set_grad_enabled(grad):
        traced, buffer = torch.jit.trace(model, x[:3], check_trace=False), io.BytesIO()
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        for graph in (traced, torch.jit.load(buffer)):
            assert agrees(kind, state)(graph(x), model(x))


def test_tracing_checks_itself_and_says_what_it_gives_up(caplog: pytest.LogCaptureFixture) -> None:
    model, x = finished("linear", "packed")
    choosing._say_that_traces_do_not_train.cache_clear()
    with caplog.at_level("WARNING", "stompp_hf"):
        torch.jit.trace(model, x)  # with its own check
    assert caplog.text.count("passes no surrogate gradient") == 1


@every
@states
@pytest.mark.parametrize("before_autograd", [False, True])
def test_graphs_of_make_fx_are_replayed_with_other_inputs(kind: str, state: str, before_autograd: bool) -> None:
    model, x = finished(kind, state)
    with torch.no_grad():
        graph = make_fx(model, pre_dispatch=before_autograd)(x)
        other = x.flip(0)
        assert agrees(kind, state)(graph(other), model(other))


@every
@states
def test_the_older_onnx_exporter_writes_the_same_model(kind: str, state: str, tmp_path: Path) -> None:
    runtime: Any = pytest.importorskip("onnxruntime")
    model, x = finished(kind, state)
    path, axes = str(tmp_path / "model.onnx"), {"x": {0: "batch"}}
    torch.onnx.export(model, (x[:3],), path, dynamo=False, input_names=["x"], dynamic_axes=axes)
    found = runtime.InferenceSession(path).run(None, {"x": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach())


# ---- modes and transformations ----


@every
@states
@pytest.mark.parametrize("mode", [Watching, lambda: FlopCounterMode(display=False), Passing])
def test_modes_that_watch_see_the_same_numbers(kind: str, state: str, mode: Callable[[], Any]) -> None:
    model, x = finished(kind, state)
    with torch.no_grad():
        expected = model(x)
        with mode():
            assert agrees(kind, state)(model(x), expected)
    with Watching() as seen, torch.no_grad():
        model(x)
    assert seen.count > 5


def test_a_training_step_that_is_watched_has_the_same_gradients() -> None:
    for kind in ("linear", "conv"):
        found = []
        for mode in (torch.enable_grad, Watching):
            model, x = finished(kind, "frozen")
            with mode():
                model.train()(x).sin().sum().backward()
            found.append([p.grad for p in model.parameters() if p.grad is not None])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every
@states
def test_torch_func_gets_numbers_but_no_derivative(kind: str, state: str) -> None:
    model, x = finished(kind, state)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.func.vmap(lambda one: model(one[None])[0])(x), expected)
        assert agrees(kind, state)(torch.func.functionalize(model)(x), expected)
        values = {name: value.clone() for name, value in model.state_dict().items()}
        assert torch.equal(torch.func.functional_call(model, values, (x,)), expected)
    if x.is_floating_point():
        for call in (
            lambda: torch.func.grad(lambda one: model(one).sum())(x),
            lambda: torch.func.jvp(model, (x,), (x,)),
        ):
            with pytest.raises(StoMPPError, match=r"no derivative|no gradient"):
                call()
        with forward_ad.dual_level(), torch.no_grad():
            assert agrees(kind, state)(model(x), expected)
            with pytest.raises(StoMPPError, match=r"no derivative|no gradient"):
                model(forward_ad.make_dual(x, x))


def test_tensors_without_values_have_shapes() -> None:
    for state in STATES:
        model, x = finished("conv", state)
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert model(mode.from_tensor(x)).shape == (7, 2)
        if state == "packed":
            assert model.to("meta")(x.to("meta")).shape == (7, 2)


# ---- the chooser itself ----


compiled = pytest.mark.skipif(kernels.native.library_path() is None, reason="the compiled part was not built")


def listeners() -> list[Any]:
    """Everything that may listen, as context managers."""
    return [Watching(), FlopCounterMode(display=False), FakeTensorMode(), Passing(),
            enable_python_dispatcher(), forward_ad.dual_level()]  # fmt: skip


def asked() -> bool:
    """What python.c would find."""
    answers = [(getattr(thing, name) if name else thing()) is good for thing, name, good in QUESTIONS]
    return not all(answers)


def test_whoever_listens_is_noticed() -> None:
    quiet = (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16))
    for context in quiet:
        with context:
            assert not is_watched() and not asked()
    with torch.device("cpu"):  # a default device: C gives way, and Python finds that it is nothing else
        assert not is_watched() and asked()
    for context in listeners():
        with context:
            assert is_watched() and asked(), context
    found: list[bool] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        found.append(is_watched() and asked())
        return x.sin()

    x = torch.ones(2)
    torch.jit.trace(look, x, check_trace=False)
    for transformed in (torch.func.vmap, torch.func.functionalize, lambda f: torch.func.jacfwd(f), make_fx):
        transformed(look)(x)
    make_fx(look, pre_dispatch=True)(x)
    torch.func.grad(lambda x: look(x).sum())(x)
    assert len(found) == 7 and all(found) and not is_watched()


@compiled
def test_what_forbids_a_call_by_address() -> None:
    class Marked(torch.Tensor):
        pass

    x, bits = torch.randn(2, 8), torch.zeros(3, 1, dtype=torch.uint8)
    wanting = torch.ones(8, requires_grad=True)
    assert kernels.route(x, bits, None, wanting.detach()) is Route.NATIVE
    with torch.no_grad():
        assert kernels.route(x, bits, wanting) is Route.NATIVE
    with kernels.switched_off():
        assert kernels.route(x, bits) is Route.TORCH
    for other in (x.double(), x.int(), x[:0], x.as_subclass(Marked), torch._neg_view(x), x.to("meta")):
        assert kernels.route(other, bits) is Route.TORCH
    for other in (wanting, bits.to("meta"), torch._neg_view(x)):
        assert kernels.route(x, other) is Route.TORCH
    assert kernels.route(x, bits, fan_in=0) is kernels.route(x, bits, fan_in=choosing.EXACT) is Route.TORCH
    for context in listeners():
        with context:
            assert kernels.route(x, bits) is Route.TORCH
    torch.compiler.reset()
    seen = torch.compile(lambda x: x + (kernels.route(x, bits) is Route.OPERATOR), backend="eager", fullgraph=True)
    assert torch.equal(seen(x), x + 1)


ELSEWHERE = {
    # Not which way a product goes: clips as tensors, states that a graph holds, values of a fused layer.
    # What is kept for the backward pass is the compiler's to plan.
    "is_compiling": {
        *("modules/binary_layer.py", "modules/stage_member.py", "modules/followed_affine.py"),
        *("method/flag_bits.py", "method/mixed_product.py"),
    },
    "is_dynamo_compiling": {"modules/prechecked_linear.py"},  # dynamo does not follow a call in C
    "is_in_onnx_export": {"method/mixing.py"},  # signs by other operators
    "is_tracing": set(),
    "is_in_functorch": {"modules/stage_member.py"},  # whether a state can be read
    "_dispatch_stack": set(),
}
COMPUTING = ("kernels/", "method/", "modules/", "inference/", "surgery/attention_interface", "checkpoints/packing")
CALLS = {"attending.py", "calls.py", "training.py", "triton_linear.py", "torch.py", "prechecked_linear.py"}
"""The files that call kernels, or compare addresses, where `route` or `is_watched` was asked."""


def test_a_kernel_is_chosen_in_one_place() -> None:
    folder = Path(stompp_hf.__file__).parent
    files = {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in folder.rglob("*.py")}
    del files["kernels/choosing.py"]
    for name, allowed in ELSEWHERE.items():
        computing = {path for path in files if path.startswith(COMPUTING)}
        found = {path for path in computing if re.search(rf"{re.escape(name)}\b", files[path])}
        assert found <= allowed, name
    addresses = {path.rpartition("/")[2] for path, text in files.items() if re.search(r"data_ptr\(", text)}
    assert {name for name in addresses if name not in ("probe.py", "dataflow.py", "quantizer.py")} <= CALLS
    natives = {path.rpartition("/")[2] for path, text in files.items() if "native.stompp_" in text}
    assert natives <= {*CALLS, "native.py"}

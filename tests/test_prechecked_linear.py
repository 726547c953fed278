"""Fused linear layers that go straight to C: they follow their tensors, and give way where they must."""

import copy
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from stompp_hf import StoMPPConfig, kernels
from stompp_hf.checkpoints.packing import pack_members
from stompp_hf.errors import PackingError
from stompp_hf.inference.fused_layers import FusedLayer, fuse
from stompp_hf.kernels.kept import _kept
from stompp_hf.modules import binary_class_of, prechecked_linear

pytestmark = pytest.mark.skipif(kernels.native.library_path() is None, reason="the compiled part was not built")


def packed(plain: nn.Module, binarize: str = "weights_and_activations", scale: str = "channel") -> Any:
    """A packed layer of its own, calibrated on normal numbers."""
    layer: Any = binary_class_of(plain).convert(plain, StoMPPConfig(binarize=binarize, weight_scale=scale))  # type: ignore[union-attr]
    layer.calibrate_weight()
    if binarize != "weights":
        layer.calibrate_activation(torch.randn(64, layer.product.features(layer.weight)))
    layer.enter("frozen", 1.0)
    pack_members({"layer": layer})
    return layer.eval()


def fused(binarize: str = "weights_and_activations") -> Any:
    """A fused linear layer of 70 features and 40 outputs, without gradients."""
    layer = packed(nn.Linear(70, 40), binarize)
    fuse(layer, *layer.scale_and_shift())
    return layer.requires_grad_(False)


def expected(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What plain torch gives."""
    with kernels.switched_off():
        return layer(x)


def direct(layer: Any, x: torch.Tensor) -> bool:
    """Whether the layer computed x without its ordinary way, and right."""
    found, y = layer.prepared(layer, x), layer(x)
    assert y.dtype == layer.output_dtype and torch.equal(y, expected(layer, x))
    return found is not None and torch.equal(found, y)


@pytest.mark.parametrize("shape", [(70,), (1, 70), (2, 1, 70), (1, 1, 70), (5, 70), (3, 2, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_are_those_of_the_ordinary_way(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = fused()
    layer(torch.randn(shape))
    for _ in range(3):  # the shape is new, then known
        x = torch.randn(shape).to(dtype)
        assert direct(layer, x)
        assert layer(x).data_ptr() != layer(x).data_ptr() or x.numel() == 0
    strided = torch.randn(*shape, 2)[..., 0]
    assert not direct(layer, strided)
    halves = copy.deepcopy(layer).to(torch.bfloat16)
    halves(strided)
    assert direct(halves, strided.bfloat16()) and direct(layer, strided.contiguous())


def test_a_layer_follows_its_tensors() -> None:
    torch.manual_seed(0)
    layer, other, x = fused(), fused(), torch.randn(1, 70)
    layer(x)
    assert direct(layer, x)
    layer.weight_bits.copy_(other.weight_bits)
    assert direct(layer, x)
    layer.load_state_dict(other.state_dict(), assign=True)
    assert direct(layer, x)
    layer.activation_threshold.data = torch.randn(70)
    layer.fused_shift.data = torch.randn(40)
    assert direct(layer, x)
    layer.weight_bits = layer.weight_bits.clone() ^ 1
    assert direct(layer, x)
    layer.share_memory()
    assert direct(layer, x)
    fuse(layer, layer.fused_scale * 2, None)
    assert direct(layer, x)
    layer.double()
    assert layer(x).dtype == torch.float64 and layer.prepared(layer, x) is None
    layer.float()
    assert layer(x).dtype == torch.float32
    layer.unfuse()
    assert layer.prepared is None and torch.equal(layer(x), expected(layer, x))


def test_copies_make_their_own() -> None:
    torch.manual_seed(0)
    layer, x = fused(), torch.randn(1, 70)
    y = layer(x)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert again.prepared is None and torch.equal(again(x), y)
        again.weight_bits ^= 1
        assert direct(again, x) and not torch.equal(again(x), y) and torch.equal(layer(x), y)


def test_it_gives_way() -> None:
    torch.manual_seed(0)
    layer, x = fused(), torch.randn(2, 70)
    y = layer(x)

    class Marked(torch.Tensor):
        pass

    for given in (x.double(), x.as_subclass(Marked), x[:0], x.to("meta"), torch.randn(2, 69)):
        assert layer.prepared(layer, given) is None
    with kernels.switched_off():
        assert layer.prepared(layer, x) is None
    assert layer.prepared(layer, x) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.prepared(layer, x) is None and torch.equal(layer(x), y.bfloat16())
    with pytest.raises(PackingError, match="gives no gradient"):
        layer(x.clone().requires_grad_())
    with torch.device("meta"):  # what is made without a device would be without values
        assert torch.equal(layer(x), y)
    torch.compiler.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), y)
    seen: list[torch.Tensor] = []
    layer.register_forward_hook(lambda m, a, y: seen.append(y))
    assert torch.equal(layer(x), y) and len(seen) == 1


def test_real_inputs() -> None:
    torch.manual_seed(0)
    layer, x = fused("weights"), torch.randn(1, 70)
    for _ in range(3):
        torch.testing.assert_close(layer(x), expected(layer, x), rtol=1e-4, atol=1e-5)
    assert layer.prepared(layer, x) is not None or kernels.choice().instructions == "portable"
    assert layer.prepared(layer, x.bfloat16()) is None


@pytest.mark.parametrize("binarize", ["weights_and_activations", "weights"])
def test_few_rows_are_computed_in_c_altogether(binarize: str, monkeypatch: pytest.MonkeyPatch) -> None:
    native: Any = kernels.choice().native
    if not hasattr(native, "stompp_whole_call"):
        pytest.skip("the compiled part was built without Python's headers")
    torch.manual_seed(0)
    layer, found = fused(binarize), []
    if binarize == "weights" and not native.stompp_has_real():
        pytest.skip("real inputs are torch's on this CPU")
    other, quick = copy.deepcopy(layer), native.stompp_whole_call

    def watched(*arguments: Any) -> Any:
        found.append(quick(*arguments))
        return found[-1]

    monkeypatch.setattr(native, "stompp_whole_call", watched)
    for rows, times in ((1, 3), (2, 2), (5, 2)):
        for _ in range(times):
            x = torch.randn(rows, 70)
            torch.testing.assert_close(layer(x), expected(other, x), rtol=1e-4, atol=1e-5)
    # Each shape is prepared for by its first call; five rows are not, and so ask in vain for two.
    assert [y is not None for y in found] == [True, True, False, True, False, False]
    assert found[0].data_ptr() != found[1].data_ptr()
    for wrong in ((), ((), (), x), (("shared",) * 11, ("own",) * 20, x, x), (("shared",) * 11, ("own",) * 19, x)):
        with pytest.raises(TypeError):
            quick(*wrong)
    shared, own = layer.prepared.own[:0], layer.prepared.own
    with pytest.raises(TypeError):
        quick(shared, own, x)


def test_several_threads_call_one_layer() -> None:
    torch.manual_seed(0)
    layer = fused()
    inputs = [torch.randn(1 + i % 3, 70) for i in range(40)]
    wanted = [expected(layer, x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            layer.prepared = None
            assert all(torch.equal(a, b) for a, b in zip(pool.map(layer, inputs), wanted, strict=True))


def test_calls_by_ctypes_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Python's headers were missing when the compiled part was built."""
    torch.manual_seed(0)
    layer, real, x = fused(), fused("weights"), torch.randn(1, 70)
    found = layer(x), real(x)
    monkeypatch.setattr(kernels.native, "_functions_of_python", lambda path: {})
    kernels.use()
    assert direct(layer, x) and torch.equal(layer(x), found[0]) and torch.equal(real(x), found[1])
    monkeypatch.undo()
    kernels.use()


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("groups", [1, 2])
def test_what_convolutions_keep_is_an_eighth(kernel: int, groups: int) -> None:
    torch.manual_seed(0)
    for channels in range(1, 65):
        plain = nn.Conv2d(groups * channels, 8 * groups, kernel, padding=kernel // 2, groups=groups, bias=False)
        layer, x = packed(plain), torch.randn(1, groups * channels, 6, 6)
        with torch.no_grad():
            y = layer(x)
            assert channels % 9 or torch.equal(y, expected(layer, x))
        bits = layer.weight_bits.nbytes
        kept = sum(value.nbytes for _, value in _kept.get(layer.weight_bits, {}).values())
        if channels * kernel * kernel > 1:  # of a single weight, the byte that holds its bit is a quarter
            assert bits + kept <= layer.weight_count * 4 / 8, (channels, bits, kept)


class OddLinear(nn.Linear):
    """A subclass whose input has another name."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features)


@pytest.mark.parametrize("plain", [nn.Linear(70, 40), OddLinear(70, 40), Conv1D(40, 70), nn.Conv2d(70, 40, 1)])
def test_a_fused_layer_is_a_class_of_its_own(plain: nn.Module) -> None:
    kind, name = type(plain), next(iter(inspect.signature(plain.forward).parameters))
    layer, x = packed(plain).requires_grad_(False), torch.randn(1, 70)
    x = x[:, :, None, None] if kind is nn.Conv2d else x
    packed_class, y = type(layer), layer(x)
    fuse(layer, *layer.scale_and_shift())
    assert isinstance(layer, FusedLayer) and isinstance(layer, packed_class) and isinstance(layer, kind)
    fused_class = type(layer)
    assert fused_class.__name__ == f"Fused{kind.__name__}" and "fused_scale" not in layer.state_dict()
    for again in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(again) is fused_class and torch.equal(again(x), y) and torch.equal(again(**{name: x}), y)
        again.unfuse()
        assert type(again) is packed_class and not hasattr(again, "fused_scale") and torch.equal(again(x), y)
    fuse(layer, *layer.scale_and_shift())
    assert type(layer.restore()) is kind


# ---- packed layers that nobody fused ----


@pytest.mark.parametrize("plain", [nn.Linear(70, 40), Conv1D(40, 70)])
def test_packed_layers_go_straight_where_nothing_wants_a_gradient(plain: nn.Module) -> None:
    torch.manual_seed(0)
    layer, x = packed(plain), torch.randn(1, 70)
    y = expected(layer, x).detach()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(layer(x), y)
        assert layer.prepared is not None and layer.prepared.quick(x) is not None
    trained = layer(x)  # its scales learn, and so the ordinary way
    assert trained.requires_grad and torch.equal(trained, y)
    with torch.no_grad():
        layer.weight_scale.mul_(2.0)
        assert torch.equal(layer(x), expected(layer, x)) and not torch.equal(layer(x), y)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected(layer, x))
    again = copy.deepcopy(layer)
    assert again.prepared is None and torch.equal(again(x), layer(x))
    assert "fused_scale" not in layer.state_dict() and "fused_scale" not in dict(layer.named_buffers())
    layer.unpack()
    assert not hasattr(layer, "fused_scale") and not hasattr(layer, "prepared")


def test_packed_layers_with_group_scales_do_not() -> None:
    torch.manual_seed(0)
    layer, x = packed(nn.Linear(70, 40), scale="group"), torch.randn(1, 70)
    with torch.no_grad():
        assert torch.equal(layer(x), expected(layer, x)) and layer.prepared is None


@pytest.mark.parametrize(
    "plain", [nn.Linear(768, 384), nn.Linear(333, 64, bias=False), nn.Linear(70, 37), Conv1D(40, 70)]
)
def test_real_inputs_go_straight_where_sums_have_torchs_order(plain: nn.Module) -> None:
    """Whether they have it or not, the bits are torch's; in MKL's order they are for one row and 4 outputs a time."""
    torch.manual_seed(0)
    layer = packed(plain, "weights")
    features, outputs = layer.product.features(layer._bits()), layer.weight_bits.shape[0]
    with torch.no_grad():
        for shape in ((1, features), (features,), (1, 1, features), (2, features), (5, features)):
            for _ in range(3):
                x = torch.randn(shape)
                assert torch.equal(layer(x), expected(layer, x))
                aside = torch.randn(features + 1)[1:].reshape(1, features)  # elsewhere in memory
                assert torch.equal(layer(aside), expected(layer, aside))
        x, threads = torch.randn(1, features), torch.get_num_threads()
        alike = prechecked_linear.sums_alike(layer.product, x.shape, outputs, threads, kernels.choice())
        layer(x)
        assert (layer.prepared(layer, x) is not None) == (layer.prepared.quick(x) is not None) == alike
        if "Intel" in platform_of_torch() and isinstance(plain, nn.Linear) and outputs % 4 == 0:
            assert alike
    trained = layer(x)
    assert trained.requires_grad and torch.equal(trained, expected(layer, x))


def platform_of_torch() -> str:
    """Its library for sums, and the CPU's maker, where the file that says so is there."""
    cpus = Path("/proc/cpuinfo")
    return cpus.read_text()[:400] if torch.backends.mkl.is_available() and cpus.exists() else ""


def test_real_inputs_in_another_order_go_the_ordinary_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch multiplied otherwise, or with other threads than it was asked for."""
    torch.manual_seed(0)
    layer, x = packed(nn.Linear(128, 64), "weights"), torch.randn(1, 128)
    product = layer.product

    class Backwards(type(product)):  # type: ignore[misc]
        def __call__(self, x: torch.Tensor, weight: torch.Tensor, pad: float = 0.0) -> torch.Tensor:
            return (x.reshape(-1, 1, 128) * weight).flip(-1).cumsum(-1)[..., -1].reshape(*x.shape[:-1], 64)

    monkeypatch.setattr(type(layer), "product", Backwards())
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(layer(x), expected(layer, x))
        assert layer.prepared(layer, x) is None and layer.prepared.quick(x) is None
    monkeypatch.setattr(type(layer), "product", product)
    monkeypatch.setattr(prechecked_linear, "sums_alike", lambda *arguments: True)
    layer.prepared = None
    with torch.no_grad():
        layer(x)
        assert layer.prepared.quick(x) is not None
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        assert layer.prepared.quick(x) is None
        torch.set_num_threads(threads)
        assert layer.prepared.quick(x) is not None and layer.prepared(layer, x.bfloat16()) is None


def test_training_lets_go_of_what_was_kept() -> None:
    """Optimizers of old write through `.data`, which no version counts; training lies between evaluations."""
    torch.manual_seed(0)
    layer, x = packed(nn.Linear(70, 40)), torch.randn(1, 70)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        layer.train()
        assert layer.prepared is None
        layer.weight_scale.data.mul_(2.0)
        layer.bias.data += 1.0
        assert torch.equal(layer(x), expected(layer, x))
        assert torch.equal(layer.eval()(x), expected(layer, x))

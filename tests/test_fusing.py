"""fuse_for_inference: what is exact changes no bit, what is folded stays within its tolerance, all can be undone."""

import copy
from typing import Any

import models
import pytest
import torch
import vision
from hypothesis import given, settings, strategies as st
from models import logits, quick, train
from torch import nn

from stompp_hf import (
    Progression,
    StoMPPConfig,
    binarize_model,
    calibrate,
    fuse_for_inference,
    kernels,
    pack_model,
    restore_model,
    unfuse,
    unpack_model,
)
from stompp_hf.checkpoints.packing import pack_members
from stompp_hf.errors import PackingError
from stompp_hf.inference.folded_batchnorm import FoldedBatchNorm
from stompp_hf.inference.fused_layers import fuse
from stompp_hf.inference.separable_pooling import SeparableMaxPool2d
from stompp_hf.kernels.kept import _kept
from stompp_hf.modules import BinaryLinear, binary_class_of
from stompp_hf.modules.packed import PackedLayer
from stompp_hf.modules.prechecked_linear import PreparedLinear
from stompp_hf.surgery.members import binary_layers

CASES = {**models.CASES, **vision.CASES}
FUSED = ("bert", "gpt2", "t5", "vit", "resnet", "resnet-bottleneck", "mobilenet_v2", "convnextv2", "regnet-y")
compiled = pytest.mark.skipif(kernels.native.library_path() is None, reason="the compiled part was not built")


def packed(name: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A packed model whose BatchNorms have seen something, and a batch."""
    case = CASES[name]
    model = binarize_model(case.build(), quick(**options))
    train(model, case, 0, 6, 6)
    return pack_model(model).eval(), case.batch(77)


def kernels_and_torch(model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with the compiled part, where it is there, and in plain torch."""
    found = logits(model, batch)
    kernels.use("torch")
    expected = logits(model, batch)
    kernels.use()
    return found, expected


@pytest.mark.parametrize("name", CASES)
def test_models_compute_the_same_with_kernels_and_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = packed(name)
    calls: list[str] = []
    for kind in ("linear", "conv"):
        original = getattr(kernels, kind)
        monkeypatch.setattr(kernels, kind, lambda *a, o=original, k=kind: (calls.append(k), o(*a))[1])
    straight = PreparedLinear.__call__
    monkeypatch.setattr(PreparedLinear, "__call__", lambda *a: (calls.append("straight"), straight(*a))[1])
    found, expected = kernels_and_torch(model, batch)
    assert torch.equal(found, expected)
    if kernels.choice().used == "c":
        assert len(calls) >= len(binary_layers(model))  # every layer, once or more often
    fuse_for_inference(model, exact=True)
    assert torch.equal(logits(model, batch), expected)
    assert not any(isinstance(module, FoldedBatchNorm) for module in model.modules())


@pytest.mark.parametrize("name", FUSED)
def test_fusing_and_undoing_it(name: str) -> None:
    model, batch = packed(name)
    before, wanting = logits(model, batch), [p.requires_grad for p in model.parameters()]
    state, outputs = copy.deepcopy(model.state_dict()), {}
    for part, layer in binary_layers(model).items():
        layer.register_forward_hook(lambda m, a, y, part=part: outputs.__setitem__(part, (a[0], y)))
    logits(model, batch)
    plain = {part: (x.detach(), y.detach()) for part, (x, y) in outputs.items()}
    for layer in binary_layers(model).values():
        layer._forward_hooks.clear()
    norms = dict(model.named_modules())
    assert fuse_for_inference(model, batch) is model
    assert model.state_dict().keys() == state.keys()
    folded = [part for part, module in model.named_modules() if isinstance(module, FoldedBatchNorm)]
    # Every BatchNorm behind a packed convolution of these nets is the only one that reads it.
    behind = {"resnet": 8, "resnet-bottleneck": 12, "mobilenet_v2": 48, "regnet-y": 12}
    assert len(folded) == behind.get(name, 0)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for part, layer in binary_layers(model).items():
        x, y = plain[part]
        if hasattr(layer, "fused_cut"):
            continue  # it takes what comes before its activation: tests/test_folded_activations.py
        found = layer(x)
        if (norm := _norm_behind(part, norms, folded)) is not None:
            y = unfused_norm(norm)(y)
            torch.testing.assert_close(found, y, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(found, y)
    if not folded:
        assert torch.equal(logits(model, batch), before)
    found, expected = kernels_and_torch(model, batch)
    assert torch.equal(found, expected)  # whatever was folded, with kernels and without
    pools = [module for module in model.modules() if isinstance(module, nn.MaxPool2d)]
    assert all(isinstance(pool, SeparableMaxPool2d) for pool in pools)
    assert bool(pools) == name.startswith("resnet")
    assert unfuse(model) is model and torch.equal(logits(model, batch), before)
    assert not any(isinstance(module, SeparableMaxPool2d) for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == wanting
    assert not any(isinstance(module, FoldedBatchNorm) for module in model.modules())


def _norm_behind(part: str, modules: dict[str, nn.Module], folded: list[str]) -> Any:
    """The folded BatchNorm beside a convolution, by name."""
    parent = part.rpartition(".")[0]
    beside = [name for name in folded if name.rpartition(".")[0] == parent]
    return modules[beside[0]] if beside else None


def unfused_norm(norm: Any) -> Any:
    """The BatchNorm itself."""
    return copy.deepcopy(norm).restore()


def test_what_is_fused_does_not_train_and_saves_as_before(tmp_path: Any) -> None:
    model, batch = packed("resnet")
    with pytest.raises(PackingError, match="not packed"):
        fuse_for_inference(unpack_model(copy.deepcopy(model)))
    before = logits(model, batch)
    fuse_for_inference(model, batch)
    with pytest.raises(PackingError, match="fused already"):
        fuse_for_inference(model)
    x = torch.randn(2, 8, 8, 8, requires_grad=True)
    layer = next(layer for layer in binary_layers(model).values() if layer.weight.shape[1] == 8)
    with pytest.raises(PackingError, match="gives no gradient"):
        layer(x)
    with pytest.raises(PackingError, match=r"cannot train: call model.eval\(\)"):
        copy.deepcopy(model).train()(**batch)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path), batch), before)
    plain = restore_model(copy.deepcopy(model))
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert not any(isinstance(module, FoldedBatchNorm) for module in plain.modules())
    assert torch.equal(logits(unpack_model(model), batch), before)


def test_fused_models_in_half_precision_and_under_autocast() -> None:
    model, batch = packed("bert")
    halves = copy.deepcopy(model).to(torch.bfloat16)
    fused = fuse_for_inference(copy.deepcopy(halves), batch)
    assert torch.equal(logits(fused, batch), logits(halves, batch))
    later = fuse_for_inference(copy.deepcopy(model), batch).to(torch.bfloat16)
    layer: Any = binary_layers(later)["bert.encoder.layer.0.output.dense"]
    assert layer.fused_scale.dtype == torch.float32
    wide = fuse_for_inference(copy.deepcopy(model), batch).double()
    assert torch.allclose(logits(wide, batch), logits(copy.deepcopy(model).double(), batch), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(fuse_for_inference(model, batch), batch), logits(unfuse(model), batch))


class Forked(nn.Module):
    """Convolutions whose BatchNorms must not be folded: read twice, kept as an output, or called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.stem(x)
        y = self.blocks[0](x)
        x = self.norms[0](y) + y  # read by an addition too
        kept = self.blocks[1](x)
        x = self.norms[1](kept)
        x = self.norms[2](self.blocks[2](x))
        x = self.norms[2](x)  # of something else, too
        x = self.norms[3](self.blocks[3](x))  # the only one that can
        return self.head(x.mean((2, 3))), kept


def test_only_batch_norms_that_alone_read_a_layer_are_folded() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    model = binarize_model(Forked(), StoMPPConfig(refresh_rate=2), x)
    Progression(model, 10).step(10)
    calibrate(model, [(x,)])
    pack_model(model).eval()
    with torch.no_grad():
        before = model(x)
    fuse_for_inference(model, x)
    assert [isinstance(norm, FoldedBatchNorm) for norm in model.norms] == [False, False, False, True]
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_a_batch_norm_that_is_not_finite_stays(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = packed("resnet")
    norm = next(m for m in model.resnet.encoder.modules() if isinstance(m, nn.BatchNorm2d))
    norm.running_var[0] = float("nan")
    with caplog.at_level("WARNING", "stompp_hf"):
        fuse_for_inference(model, batch)
    assert type(norm) is nn.BatchNorm2d and "and stays" in caplog.text


# ---- real inputs ----


def test_binary_weights_with_real_inputs() -> None:
    model, batch = packed("bert", binarize="weights")
    before = logits(model, batch)
    assert torch.equal(*kernels_and_torch(model, batch))  # bit for bit, as long as nothing is fused
    fuse_for_inference(model, batch, exact=True)
    assert torch.equal(logits(model, batch), before)
    fuse_for_inference(unfuse(model), batch)
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-4, atol=1e-5)


@compiled
@pytest.mark.parametrize("cpu", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize(
    ("rows", "inner", "outer"), [(1, 1, 1), (1, 768, 200), (3, 33, 65), (70, 100, 31), (2, 5000, 9)]
)
def test_sums_by_look_up_are_close(cpu: str, rows: int, inner: int, outer: int) -> None:
    if kernels.use("c", cpu).instructions != cpu:
        kernels.use()
        pytest.skip(f"this CPU has no {cpu}")
    torch.manual_seed(inner)
    x, plain = torch.randn(rows, inner), nn.Linear(inner, outer)
    layer: Any = BinaryLinear.convert(plain, StoMPPConfig(binarize="weights"))
    layer.calibrate_weight()
    layer.enter("frozen", 1.0)
    pack_members({"layer": layer})
    assert isinstance(layer, PackedLayer)
    weight, scale = layer.weight.double(), layer.weight_scale.double()
    fuse(layer, *layer.scale_and_shift())
    expected = x.double() @ weight.T + layer.bias.double()
    with torch.no_grad():
        found = layer(x)
    kernels.use()
    bound = inner * 2**-23 * scale * x.abs().double().sum(1, keepdim=True) + 2**-22 * expected.abs() + 1e-7
    assert bool(((found - expected).abs() <= bound).all())


def test_operator_of_real_inputs_passes_its_checks() -> None:
    bits = torch.randint(0, 256, (9, 5), dtype=torch.uint8)
    for shift in (None, torch.randn(9)):
        torch.library.opcheck(
            torch.ops.stompp_hf.packed_real_linear, (torch.randn(2, 3, 40), bits, torch.randn(9), shift)
        )


# ---- memory ----


@compiled
@pytest.mark.parametrize("plain", [nn.Linear(512, 256), nn.Conv2d(64, 128, 3, padding=1), nn.Conv2d(128, 64, 1)])
def test_what_stays_in_memory_is_an_eighth(plain: nn.Module) -> None:
    x = torch.randn(2, 512) if isinstance(plain, nn.Linear) else torch.randn(2, plain.weight.shape[1], 8, 8)
    full = plain.weight.numel() * 4
    layer: Any = binary_class_of(plain).convert(plain, StoMPPConfig())  # type: ignore[union-attr]
    layer.calibrate_weight()
    layer.calibrate_activation(layer.product.rows(x))
    layer.enter("frozen", 1.0)
    pack_members({"layer": layer})
    with torch.no_grad():
        layer(x)
    kept = sum(value.nbytes for _, value in _kept.get(layer.weight_bits, {}).values())
    own = sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))
    assert own + kept <= full / 8


# ---- graphs ----


@pytest.mark.parametrize(("name", "fused"), [("bert", False), ("resnet", True)])
def test_graphs_hold_the_operators(name: str, fused: bool) -> None:
    model, batch = packed(name)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if fused:
        fuse_for_inference(model, inputs)
    expected = logits(model, batch)
    with torch.no_grad():
        torch.compiler.reset()
        compiled_model = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled_model(**inputs).logits, expected)
        exported = torch.export.export(model, (), inputs)
        targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
        assert sum(target.startswith("stompp_hf.") for target in targets) == len(binary_layers(model))
        assert torch.equal(exported.module()(**inputs).logits, expected)


# ---- pools ----


@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(1, 9),
    st.integers(1, 9), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_pools_one_dimension_after_the_other(
    high: int, wide: int, down: int, along: int, around: int, rows: int, columns: int, dtype: torch.dtype, seed: int
) -> None:
    around = min(around, high // 2, wide // 2)
    rows, columns = max(rows, high - 2 * around), max(columns, wide - 2 * around)
    torch.manual_seed(seed)
    x = torch.randn(2, 3, rows, columns).to(dtype)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0]).to(dtype)
    places = torch.randint(0, x.numel(), (4,))
    x.view(-1)[places] = special
    pool = nn.MaxPool2d((high, wide), (down, along), around)
    expected = pool(x)
    assert SeparableMaxPool2d.fits(pool)
    pool.__class__ = SeparableMaxPool2d
    last = x.contiguous(memory_format=torch.channels_last)
    for images, found in ((expected, pool(x)), (expected, pool(last)), (expected[0], pool(x[0]))):
        assert torch.equal(found.isnan(), images.isnan())
        assert torch.equal(found.nan_to_num(7.0), images.nan_to_num(7.0))
    with pytest.raises(RuntimeError):
        pool(torch.ones(3))
    assert type(pool.restore()) is nn.MaxPool2d
    assert not SeparableMaxPool2d.fits(nn.MaxPool2d(3, ceil_mode=True))
    assert not SeparableMaxPool2d.fits(nn.MaxPool2d(3, return_indices=True))
    assert not SeparableMaxPool2d.fits(nn.MaxPool2d(3, dilation=2))

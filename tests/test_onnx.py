"""ONNX files, run by onnxruntime against torch: single layers bit for bit, whole models up to float rounding.

Whole models: what is real in them is rounded differently by the two, so logits may differ by TOLERANCE. A value that
comes within that rounding of its threshold would differ by a whole level; none does here.
"""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import beyond
import models
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import vision
from models import quick, same_tensors, train
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stompp_hf import BinaryAttention, Progression, StoMPPConfig, binarize_model, calibrate, export_onnx, pack_model
from stompp_hf.cli import main
from stompp_hf.errors import ExportError, NonFiniteError, NotBinarizedError, PackingError
from stompp_hf.export.forms import Form, code_table, export_form, sign_table
from stompp_hf.modules.packed import PackedAttention
from stompp_hf.surgery.members import binary_layers

TOLERANCE = {"rtol": 1e-4, "atol": 5e-6}
STEPS = 6
BERT = models.CASES["bert"]
CASES = {**models.CASES, **vision.CASES}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert, weights": ("bert", {"binarize": "weights"}),
    "bert, attention and embeddings": ("bert", beyond.BOTH),
    "gpt2": ("gpt2", {}),
    "resnet": ("resnet", {}),
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "llama-tied": ("llama-tied", {}),
    "llama, attention and embeddings": ("llama", beyond.BOTH),
    "t5": ("t5", {}),
    "vit, a relu for gelu": ("vit", {"gelu": "relu", "relu": "keep"}),
    "vit, attention": ("vit", {"attention": "binarize"}),
    "resnet, padding with one": ("resnet", {"conv_padding": "one"}),
    "resnet, weights": ("resnet", {"binarize": "weights"}),
    "mobilenet_v2": ("mobilenet_v2", {}),
    "convnextv2": ("convnextv2", {}),
}


INTEGER = ("MatMulInteger", "ConvInteger")


def depthwise(layer: Any) -> bool:
    return getattr(layer, "groups", 1) > 1 and layer.weight_shape[1] == 1


def session(path: Path, **options: Any) -> onnxruntime.InferenceSession:
    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads = 1
    chosen.log_severity_level = 3
    for name, value in options.items():
        setattr(chosen, name, value)
    return onnxruntime.InferenceSession(str(path), chosen, providers=["CPUExecutionProvider"])


def answers(path: Path, inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """What onnxruntime computes, by output."""
    run = session(path, **options)
    names = [output.name for output in run.get_outputs()]
    found = run.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return dict(zip(names, map(torch.from_numpy, found), strict=True))


def finished(name: str, options: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """A model trained to the end, and inputs."""
    case = CASES[name]
    plain = beyond.build(name) if "attention" in options else case.build()
    model = binarize_model(plain, quick(**options))
    train(model, case, 0, STEPS, STEPS)
    batch = case.batch(77)
    labels = batch.pop("labels")
    if name == "t5":
        batch["decoder_input_ids"] = model._shift_right(labels)[:, :5]
    return model, batch


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {value.name: onnx.numpy_helper.to_array(value) for value in onnx.load(path).graph.initializer}


# ---- whole models ----


@pytest.mark.parametrize("name", [*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_models(name: str, tmp_path: Path) -> None:
    model, batch = finished(*{**MODELS, **MORE}[name])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    path = export_onnx(model, tmp_path / "new" / "model.onnx", batch)
    assert list((tmp_path / "new").iterdir()) == [path] and model.training
    assert same_tensors(model.state_dict(), before) == []  # neither packed nor changed

    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    assert {node.domain for node in graph.graph.node} == {""} and graph.functions == []  # standard operators alone
    assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", 20)]
    held = initializers(path)
    packed = binary_layers(pack_model(model))
    for layer_name, layer in packed.items():
        assert np.array_equal(held.pop(f"{layer_name}.weight_bits"), layer.weight_bits.numpy())
    kinds = [str(tensor.dtype) for tensor in held.values() if tensor.size > 1]
    assert "uint8" not in kinds and kinds.count("int8") == 1  # the table of signs
    products = [node.op_type for node in graph.graph.node if node.op_type in INTEGER]
    real = sum(layer.activation_scale is None or depthwise(layer) for layer in packed.values())
    attentions = sum(isinstance(module, BinaryAttention) for module in model.modules())
    assert len(products) == len(packed) - real + 2 * attentions
    assert not any(set(np.unique(tensor)) == {-1.0, 1.0} for tensor in held.values() if tensor.dtype == np.float32)

    sizes = [(4, 8), (3, 6), (1, 8)]  # the batch, and the sequence, of any length
    for rows, length in sizes if "input_ids" in batch else [(4, 8), (1, 8)]:
        inputs = {key: value[:rows] for key, value in batch.items()}
        for key in inputs.keys() & {"input_ids", "attention_mask"}:
            inputs[key] = inputs[key][:, :length]
        with torch.no_grad():
            expected = model.eval()(**inputs)
        for output, value in answers(path, inputs).items():
            torch.testing.assert_close(value, expected[output], **TOLERANCE)
        assert answers(path, inputs)["logits"].std() > 1e-3


def test_a_runtime_unpacks_once_and_keeps_signs_whole(tmp_path: Path) -> None:
    """Loading folds bits into weights of a byte each; no scale is folded into a weight whose products are exact."""
    model, batch = finished("resnet", {})
    levels = onnxruntime.GraphOptimizationLevel  # the highest one pads weights with zeros, to its own layout
    path = export_onnx(model, tmp_path / "model.onnx", batch)
    answers(
        path, batch, optimized_model_filepath=str(tmp_path / "loaded.onnx"),
        graph_optimization_level=levels.ORT_ENABLE_EXTENDED,
    )  # fmt: skip
    held = initializers(tmp_path / "loaded.onnx")
    assert not [name for name in held if name.endswith(("weight_bits", "sign_table"))]
    nodes = [node for node in onnx.load(tmp_path / "loaded.onnx").graph.node if node.op_type in INTEGER]
    weights = [np.unique(held[name]).tolist() for node in nodes for name in node.input[:2] if name in held]
    assert len(weights) == len(binary_layers(model)) == 8 and all(w in ([-1, 1], [0, 2]) for w in weights)
    plain = answers(path, batch, graph_optimization_level=levels.ORT_DISABLE_ALL)
    torch.testing.assert_close(plain["logits"], model.eval()(**batch).logits.detach(), **TOLERANCE)


# ---- single layers, bit for bit ----


class Shelf(nn.Module):
    """Layers of every kind side by side, each on an input of its own shape."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict(
            {
                "linear": nn.Linear(13, 5),
                "wide": nn.Linear(700, 8, bias=False),
                "transposed": Conv1D(6, 11),
                "line": nn.Conv1d(3, 4, 3, padding=1, bias=False),
                "plane": nn.Conv2d(4, 6, 3, stride=2, padding=1),
                "grouped": nn.Conv2d(4, 6, (3, 2), groups=2, dilation=(1, 2), padding=(2, 0)),
                "depthwise": nn.Conv2d(5, 5, 3, groups=5, padding="same"),
                "reflected": nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"),
                "space": nn.Conv3d(2, 3, 2, padding=1),
                "point": nn.Conv2d(6, 8, 1),
                "point_padded": nn.Conv2d(6, 8, 1, padding=1),
                "broad": nn.Conv2d(64, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
                "broad_line": nn.Conv1d(64, 5, 3, padding=2, padding_mode="circular"),
                "broad_space": nn.Conv3d(64, 3, 2, stride=2, padding=1, bias=False),
                "broad_point": nn.Conv2d(64, 4, 1, stride=2),
                "many_points": nn.Conv1d(512, 4, 1),
            }
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of an example's inputs."""
        rows = {"linear": (2, 13), "wide": (4, 700), "transposed": (3, 11), "line": (3, 9), "space": (2, 4, 4, 4)}
        rows |= {"broad_line": (64, 9), "broad_space": (64, 4, 3, 4), "many_points": (512, 5)}
        return {name: (6, *rows.get(name, (getattr(layer, "in_channels", 0), 7, 6)))
                for name, layer in self.layers.items()}  # fmt: skip

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {f"{name}_out": self.layers[name](x) for name, x in inputs.items()}


def frozen(plain: nn.Module, x: Tensor, **options: Any) -> Any:
    """Every layer binary, and frozen at once."""
    model = binarize_model(plain, StoMPPConfig(end=0.0, first_layer="binarize", head="binarize", **options), x)
    Progression(model, 1).step(0)
    return calibrate(model, [x]).eval()


EDGES = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, float("inf"), float("-inf")])


@pytest.mark.parametrize(
    ("levels", "padding", "scale", "form"),
    [
        ("symmetric", "zero", "channel", {}),
        ("one-sided", "zero", "tensor", {}),
        ("one-sided", "one", "channel", {"weights": "int8"}),
        pytest.param("symmetric", "one", "tensor", {}, marks=pytest.mark.slow),
        pytest.param("one-sided", "zero", "channel", {"products": "float32"}, marks=pytest.mark.slow),
        pytest.param("symmetric", "zero", "tensor", {"products": "float32", "weights": "int8"}, marks=pytest.mark.slow),
    ],
)
def test_layers_are_exact_also_at_their_thresholds(
    levels: str, padding: str, scale: str, form: dict[str, Any], tmp_path: Path
) -> None:
    shelf = Shelf()
    x = {name: torch.randn(shape).mul(2).round() for name, shape in shelf.shapes().items()}  # many exact zeros
    config = StoMPPConfig(
        end=0.0, first_layer="binarize", head="binarize", conv_padding=padding, weight_scale=scale,
        activation_levels="symmetric",
    )  # fmt: skip
    for name in x:  # forward takes them by name
        shelf.layers[name].weight.data.flatten()[:2] = torch.tensor([0.0, -0.0])
    model = binarize_model(shelf, config, x)
    Progression(model, 1).step(0)
    calibrate(model, [x])
    layers = binary_layers(model)
    assert len(layers) == len(x)
    for layer in layers.values():
        layer.activation_offset = float(levels == "one-sided")
        layer.activation_threshold.data.round_()
        layer.activation_threshold.data[::2] = 0.0
    path = export_onnx(model, tmp_path / "shelf.onnx", x, **form)
    for tensor in x.values():
        tensor.view(-1)[: len(EDGES)] = EDGES
    with torch.no_grad():
        expected = model(**x)
    found = answers(path, x)
    assert same_tensors(found, expected) == []
    assert all(torch.isfinite(value).all() and value.unique().numel() > 2 for value in found.values())

    x["linear"][0, 0] = float("nan")  # counts as -1
    low = x["linear"].clone()
    low[0, 0] = float("-inf")
    assert torch.equal(answers(path, x)["linear_out"], answers(path, {**x, "linear": low})["linear_out"])


def test_an_image_without_a_batch(tmp_path: Path) -> None:
    x = torch.randn(64, 5, 6)
    model = frozen(nn.Sequential(nn.Conv2d(64, 3, 3, padding=1), nn.Conv2d(3, 4, 2), nn.Conv2d(4, 3, 1)), x)
    path = export_onnx(model, tmp_path / "model.onnx", x, dynamic_axes={})
    torch.testing.assert_close(answers(path, {"input": x})["output"], model(x).detach(), **TOLERANCE)


class Products(nn.Module):
    """Both products of an attention module, without the softmax between them."""

    def __init__(self, attention: BinaryAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, factor: Tensor) -> Any:
        q, k, v = self.attention._operands(query, key, value)
        p = self.attention._operand("probability", weights)
        return self.attention._product(q, k.transposed()), self.attention._product(p, v, factor)


@pytest.mark.parametrize("integers", [True, False])
def test_products_of_attention_are_exact(integers: bool, tmp_path: Path) -> None:
    """With groups of heads, excluded entries, and values at their thresholds."""
    torch.manual_seed(0)
    attention = BinaryAttention(StoMPPConfig(attention="binarize"), [4, 2, 8, 6], torch.zeros(1))
    for name, tensor in attention.named_parameters():
        tensor.data.copy_(torch.randn(tensor.shape).round() if "threshold" in name else torch.rand(tensor.shape))
    attention.enter("frozen", 1.0)
    packed = copy.deepcopy(attention)
    PackedAttention.pack(packed, {})
    export_form(packed, Form(integers, True, False, sign_table(), code_table()))
    shapes = {"query": (3, 4, 5, 8), "key": (3, 2, 7, 8), "value": (3, 2, 7, 6), "weights": (3, 2, 2, 5, 7)}
    x = {name: torch.randn(shape).mul(2).round() for name, shape in shapes.items()}
    x["factor"] = (torch.rand(3, 2, 2, 5, 7) > 0.3).float()
    path = tmp_path / "products.onnx"
    torch.onnx.export(Products(packed), tuple(x.values()), str(path), input_names=list(x), verbose=False)
    found, expected = list(answers(path, x).values()), Products(attention)(*x.values())
    assert all(torch.equal(a, b.detach()) for a, b in zip(found, expected, strict=True))
    assert len([node for node in onnx.load(path).graph.node if node.op_type in INTEGER]) == 2 * integers


def test_rows_of_an_embedding_are_exact(tmp_path: Path) -> None:
    """Also where a row is all zeros, or the padding."""
    ids = torch.tensor([[0, 3, 5, 10], [7, 7, 1, 0]])
    for padding in (None, 0):
        table = nn.Embedding(11, 13, padding_idx=padding)
        table.weight.data[5] = 0.0
        model = frozen(nn.Sequential(table, nn.Linear(13, 4)), ids, embeddings="binarize")
        path = export_onnx(Rows(model), tmp_path / "model.onnx", ids)
        assert torch.equal(answers(path, {"ids": ids})["output"], model[0](ids).detach())


class Rows(nn.Module):
    """The first of a model's layers alone; the plan goes along."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model[0](ids)  # type: ignore[index]


def test_two_bits_for_real_inputs(tmp_path: Path) -> None:
    """onnxruntime's operator, off by the rounding of its input to a byte; rows need not be whole blocks."""
    torch.manual_seed(0)
    x = torch.randn(16, 3, 150)
    for layer in (nn.Linear(150, 40), Conv1D(40, 150), nn.Linear(150, 8, bias=False)):
        model = frozen(nn.Sequential(layer), x, binarize="weights")
        expected = model(x).detach()
        path = export_onnx(model, tmp_path / "model.onnx", x, weights_only="matmul_nbits")
        assert [node.op_type for node in onnx.load(path).graph.node].count("MatMulNBits") == 1
        found = answers(path, {"input": x})["output"]
        assert 0 < (found - expected).abs().mean() / expected.abs().mean() < 0.01


# ---- arguments ----


@pytest.fixture(scope="module")
def bert() -> tuple[Any, dict[str, Tensor]]:
    return finished("bert", {})


def test_the_command_makes_inputs_up(bert: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, batch = bert
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model.onnx"
    assert main(["export-onnx", str(tmp_path / "model"), str(path), "--weights", "int8"]) == 0
    assert f"{path.stat().st_size:,} bytes" in capsys.readouterr().out
    assert [value.shape for value in session(path).get_inputs()] == [["batch", "sequence"]] * 2
    torch.testing.assert_close(answers(path, batch)["logits"], model.eval()(**batch).logits.detach(), **TOLERANCE)
    assert main(["export-onnx", str(tmp_path / "nowhere"), str(path)]) == 1


def small() -> tuple[Any, Tensor]:
    """Three layers, frozen, and an input."""
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    model = binarize_model(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), StoMPPConfig(end=0.0), x)
    Progression(model, 1).step(0)
    return calibrate(model, [x]), x


def test_axes_of_ones_own_and_another_operator_set(tmp_path: Path) -> None:
    model, x = small()
    for axes in ({"input": {0: "rows"}}, {}):
        path = export_onnx(model, str(tmp_path / "model.onnx"), x[:1], dynamic_axes=axes, opset_version=18)
        assert session(path).get_inputs()[0].shape == (["rows", 4] if axes else [1, 4])
        assert onnx.load(path).opset_import[0].version == 18
        rows = x if axes else x[:1]
        torch.testing.assert_close(answers(path, {"input": rows})["output"], model(rows).detach(), **TOLERANCE)


def test_half_precision_is_exported_in_float32(tmp_path: Path) -> None:
    model, x = small()
    half = pack_model(model).to(torch.bfloat16)
    path = export_onnx(half, tmp_path / "model.onnx", x.bfloat16())
    assert half[0].weight.dtype == torch.bfloat16
    x = x.bfloat16().float()
    torch.testing.assert_close(answers(path, {"input": x})["output"], half.float()(x).detach(), **TOLERANCE)


def test_what_cannot_be_exported(bert: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("what was here")
    model, batch = bert
    unfinished = binarize_model(BERT.build(), quick())
    train(unfinished, BERT, 0, 8, 12)
    with pytest.raises(PackingError, match=r"1 of 2 stages are not frozen yet: bert.encoder.layer.1\."):
        export_onnx(unfinished, path, batch)
    with pytest.raises(NotBinarizedError, match="binarize_model"):
        export_onnx(BERT.build(), path, batch)
    latents = model.get_submodule("bert.encoder.layer.1.attention.self.query").weight
    latent = latents.data[0, 0].clone()
    latents.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layer.1.attention.self.query is not finite"):
        export_onnx(model, path, batch)
    latents.data[0, 0] = latent
    with pytest.raises(ExportError, match="names 'pixels'"):
        export_onnx(model, path, batch, dynamic_axes={"pixels": {0: "batch"}})
    with pytest.raises(ExportError, match=r"names 'input_ids' with the dimensions \[2\]"):
        export_onnx(model, path, batch, dynamic_axes={"input_ids": {2: "batch"}})
    with pytest.raises(ExportError, match="from 18 on, and not 17"):
        export_onnx(model, path, batch, opset_version=17)
    with pytest.raises(ExportError, match="products is 'integer' or 'float32', and not 'int4'"):
        export_onnx(model, path, batch, products="int4")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="is a folder"):
        export_onnx(model, tmp_path, batch)
    with pytest.raises(ValueError, match="specify exactly one of input_ids"):  # the model's own words
        export_onnx(model, path, {"unknown_input": batch["input_ids"]})
    with pytest.raises(ExportError, match="cannot make up inputs for Sequential"):
        export_onnx(small()[0], path)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "onnxscript" else find_spec(n, *a))
    with pytest.raises(ExportError, match=r"needs onnxscript: pip install 'stompp-hf\[onnx\]'"):
        export_onnx(model, path, batch)
    assert path.read_text() == "what was here" and list(tmp_path.iterdir()) == [path]


class Branching(nn.Module):
    """Its path depends on the data: no graph can be recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if x.sum() > 0 else -layer(x)
        return x


def test_what_torch_cannot_record(tmp_path: Path) -> None:
    x = torch.randn(8, 4)
    model = binarize_model(Branching(), StoMPPConfig(end=0.0), x)
    Progression(model, 1).step(0)
    calibrate(model, [x])
    with pytest.raises(ExportError, match="torch cannot record Branching"):
        export_onnx(model, tmp_path / "model.onnx", x)
    assert not list(tmp_path.iterdir())

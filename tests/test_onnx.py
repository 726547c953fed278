"""ONNX files, run by onnxruntime against torch: single layers bit for bit, whole models up to float rounding.

Whole models: what is real in them is rounded differently by the two, so logits may differ by TOLERANCE. A value that
comes within that rounding of its threshold would differ by a whole level; none does here.
"""

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

from stompp_hf import Progression, StoMPPConfig, binarize_model, calibrate, export_onnx, pack_model
from stompp_hf.__main__ import main
from stompp_hf.errors import ExportError, NonFiniteError, NotBinarizedError, PackingError
from stompp_hf.plan import binary_layers

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
    "vit, attention": ("vit", {"attention": "binarize"}),
    "resnet, padding with one": ("resnet", {"conv_padding": "one"}),
    "resnet, weights": ("resnet", {"binarize": "weights"}),
    "mobilenet_v2": ("mobilenet_v2", {}),
    "convnextv2": ("convnextv2", {}),
}


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
    assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", 18)]
    held = initializers(path)
    packed = binary_layers(pack_model(model))
    for layer_name, layer in packed.items():
        assert np.array_equal(held.pop(f"{layer_name}.weight_bits"), layer.weight_bits.numpy())
    kinds = [str(tensor.dtype) for tensor in held.values()]
    assert "uint8" not in kinds and kinds.count("int8") == 1  # the table of signs
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
    """Loading folds bits into float weights; no scale is folded into a weight whose products are to be exact."""
    model, batch = finished("resnet", {})
    path = export_onnx(model, tmp_path / "model.onnx", batch)
    levels = onnxruntime.GraphOptimizationLevel  # the highest one pads weights with zeros, to its own layout
    answers(
        path, batch, optimized_model_filepath=str(tmp_path / "loaded.onnx"),
        graph_optimization_level=levels.ORT_ENABLE_EXTENDED,
    )  # fmt: skip
    held = initializers(tmp_path / "loaded.onnx")
    assert not [name for name, value in held.items() if value.dtype == np.uint8]
    nodes = onnx.load(tmp_path / "loaded.onnx").graph.node
    weights = [set(np.unique(held[node.input[1]])) for node in nodes if "Conv" in node.op_type]
    assert weights.count({-1.0, 1.0}) == len(binary_layers(model)) == 8
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
            }
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of an example's inputs."""
        rows = {"linear": (2, 13), "wide": (4, 700), "transposed": (3, 11), "line": (3, 9), "space": (2, 4, 4, 4)}
        return {name: (6, *rows.get(name, (getattr(layer, "in_channels", 0), 7, 6)))
                for name, layer in self.layers.items()}  # fmt: skip

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {f"{name}_out": self.layers[name](x) for name, x in inputs.items()}


EDGES = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, float("inf"), float("-inf")])


@pytest.mark.parametrize(
    ("levels", "padding", "scale"),
    [
        ("symmetric", "zero", "channel"),
        ("one-sided", "zero", "tensor"),
        pytest.param("symmetric", "one", "tensor", marks=pytest.mark.slow),
        ("one-sided", "one", "channel"),
    ],
)
def test_layers_are_exact_also_at_their_thresholds(levels: str, padding: str, scale: str, tmp_path: Path) -> None:
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
    path = export_onnx(model, tmp_path / "shelf.onnx", x)
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


# ---- arguments ----


@pytest.fixture(scope="module")
def bert() -> tuple[Any, dict[str, Tensor]]:
    return finished("bert", {})


def test_the_command_makes_inputs_up(bert: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, batch = bert
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model.onnx"
    assert main(["export-onnx", str(tmp_path / "model"), str(path)]) == 0
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
        path = export_onnx(model, str(tmp_path / "model.onnx"), x[:1], dynamic_axes=axes, opset_version=20)
        assert session(path).get_inputs()[0].shape == (["rows", 4] if axes else [1, 4])
        assert onnx.load(path).opset_import[0].version == 20
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

"""export_onnx: a frozen model as one ONNX file, its binary weights 8 a byte, its sums of signs in whole numbers.

torch.onnx records the graph (the dynamo exporter); what is ours is the form that binary layers take in it, and that
their bits stay bits: no optimizer unpacks them before the file is written.
"""

import copy
import importlib.util
import inspect
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..checkpoints.packing import pack_model
from ..errors import ExportError
from ..surgery.members import get_plan, members
from ..surgery.running import example_inputs_of, run
from ..surgery.unfusing import unfuse
from .arguments import check_choices, completed, refuse_folder
from .forms import Form, code_table, export_form, sign_table

logger = logging.getLogger(__name__)

OPSET = 20
"""Operator set of the file: torch's own choice, and the first in which GELU is one operator."""
OLDEST_OPSET = 18
"""The first that torch's exporter writes."""

PACKAGES = ("onnx", "onnxscript")

Axes = Mapping[str, Mapping[int, str]]
Products = Literal["integer", "float32"]
Weights = Literal["bits", "int8"]
WeightsOnly = Literal["float32", "matmul_nbits"]
CHOICES: dict[str, tuple[str, ...]] = {
    "products": get_args(Products),
    "weights": get_args(Weights),
    "weights_only": get_args(WeightsOnly),
}
"""The options of form and their values, the first of which is the default."""


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    dynamic_axes: Axes | None = None,
    opset_version: int = OPSET,
    products: Products = "integer",
    weights: Weights = "bits",
    weights_only: WeightsOnly = "float32",
) -> Path:
    """Write a frozen or packed model as an ONNX file; the model itself is not changed. Returns the file's path.

    The file holds a binary weight as bits, 8 a byte (uint8), and unpacks it to int8 with standard operators (Cast,
    Gather from a table of 256 rows, Reshape, Slice, Transpose). A runtime that folds constants does so once, when it
    loads the file. The product of two binary operands is MatMulInteger of uint8 {0, 2} with the zero point 1 and int8
    {-1, +1}, whose sums are exact: those of linear layers, of attention, and of convolutions, as a matrix product of
    what lies under the kernel, or as ConvInteger. Depthwise convolutions, and layers with a real input (W1A32),
    multiply in float32. Inputs keep their names, outputs have those of the model's output fields that are tensors
    (else output, or output_0, output_1 ...).

    Forward: in float32, that of the packed model: the sums of signs are exact, scales are applied after them, and
    sign(0) = +1. What is real (norms, attention, heads) is rounded as the runtime rounds it, and a value that comes
    close to a threshold may fall on its other side. A NaN activation counts as -1 here.

    Args:
        model: a binarized model, or a wrapper of one, with every stage frozen; or a packed one.
        path: of the file. What lies there is replaced once the new file is complete.
        example_inputs: one small batch (keyword arguments, a tuple, or one tensor); made from the config if None.
        dynamic_axes: names of the dimensions that may have another size, by input and dimension. By default the first
            dimension of every tensor is the "batch", and the second of a two-dimensional integer tensor the "sequence"
            ("decoder_sequence" where the input's name begins with decoder_). Axes of the same name have equal sizes.
        opset_version: of ONNX's operators, 18 or later.
        products: of two binary operands: "integer", or "float32" for a runtime that lacks the integer operators, with
            the same sums.
        weights: in the file: "bits", or "int8", ready to be multiplied and 8 times as large, for a runtime that does
            not fold constants and would unpack them at every run. Embeddings, whose rows are looked up before they are
            unpacked, stay bits.
        weights_only: how linear layers with a real input (W1A32) multiply: "float32", or "matmul_nbits" for
            onnxruntime's own operator of 2-bit weights (domain com.microsoft), which reads an eighth as much as int8
            would and pays with few rows. It rounds the input to int8, row by row: a layer's output is then off by 0.2
            to 0.5% of its mean size.

    Raises:
        ExportError: a package of the extra `onnx` is missing, no inputs can be made up, an argument makes no sense, or
            torch cannot record the model.
        NotBinarizedError, PackingError, NotCalibratedError, NonFiniteError: as `pack_model`.
    """
    _check_packages()
    path = Path(path)
    if opset_version < OLDEST_OPSET:
        raise ExportError(f"export_onnx writes operator sets from {OLDEST_OPSET} on, and not {opset_version}.")
    refuse_folder("export_onnx", path, "model.onnx")
    form = _form(products, weights, weights_only)
    twin = _twin(model, form)
    inputs = _by_name(model, example_inputs)
    axes = _axes(inputs) if dynamic_axes is None else _chosen(inputs, dynamic_axes)
    inputs = {name: _not_one(value, axes[name]) for name, value in inputs.items()}
    graph = _Recorded(twin, inputs)
    tensors, outputs = graph.tensors(inputs), graph.outputs(inputs)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="# The axis name")  # axes of two inputs that share one
            program: Any = torch.onnx.export(
                graph,
                tuple(tensors.values()),
                input_names=list(tensors),
                output_names=outputs,
                dynamic_shapes={"tensors": tuple(axes[name] or None for name in tensors)},
                opset_version=opset_version,
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        raise ExportError(
            f"export_onnx: torch cannot record {type(model).__name__} ({type(error).__name__}). Where the reason is a "
            "dimension that this model keeps fixed, leave it out: dynamic_axes={'input_ids': {0: 'batch'}}; other "
            "example_inputs may help, or attn_implementation='eager' when it is loaded, before binarize_model."
        ) from error
    _optimize(program.model)
    with completed(path) as part:  # with the data of a file beyond 2 GB
        program.save(part)
    return path


def _check_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"export_onnx needs {' and '.join(missing)}: pip install 'stompp-hf[onnx]', or pip install "
            f"{' '.join(missing)}."
        )


def _by_name(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """Example inputs by the name of the argument that they are given for."""
    inputs = example_inputs_of(model) if example_inputs is None else example_inputs
    if inputs is None:
        raise ExportError(
            f"export_onnx cannot make up inputs for {type(model).__name__}: pass example_inputs=, one small batch."
        )
    if isinstance(inputs, Mapping):
        return dict(inputs)
    arguments = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    return dict(inspect.signature(model.forward).bind(*arguments).arguments)


def _axes(inputs: Mapping[str, Any]) -> dict[str, dict[int, str]]:
    found: dict[str, dict[int, str]] = {}
    for name, value in inputs.items():
        tensor = isinstance(value, Tensor) and value.dim() > 0
        found[name] = {0: "batch"} if tensor else {}
        if tensor and value.dim() == 2 and not value.is_floating_point():
            found[name][1] = "decoder_sequence" if name.startswith("decoder_") else "sequence"
    return found


def _chosen(inputs: Mapping[str, Any], dynamic_axes: Axes) -> dict[str, dict[int, str]]:
    """The caller's axes, for every input."""
    for name, axes in dynamic_axes.items():
        dims = inputs[name].dim() if isinstance(inputs.get(name), Tensor) else 0
        if not all(0 <= axis < dims for axis in axes) or name not in inputs:
            raise ExportError(
                f"export_onnx: dynamic_axes names {name!r} with the dimensions {list(axes)}, and the example inputs "
                f"are {', '.join(inputs)}; give dimensions of those, from 0, as in {{'input_ids': {{0: 'batch'}}}}."
            )
    return {name: dict(dynamic_axes.get(name, {})) for name in inputs}


def _not_one(value: Any, axes: Mapping[int, str]) -> Any:
    """An example without a dynamic dimension of size 1, which torch would take for one that is always 1."""
    for axis in axes:
        if value.shape[axis] == 1:
            value = value.repeat_interleave(2, axis)
    return value


def _form(products: str, weights: str, weights_only: str) -> Form:
    check_choices("export_onnx", {"products": products, "weights": weights, "weights_only": weights_only}, CHOICES)
    return Form(products == "integer", weights == "bits", weights_only == "matmul_nbits", sign_table(), code_table())


def _twin(model: nn.Module, form: Form) -> nn.Module:
    """A copy on the CPU in float32 whose members have the form to be recorded."""
    twin = copy.deepcopy(model)
    if get_plan(twin).packed:
        unfuse(twin)  # a folded BatchNorm is recorded as itself
    else:
        pack_model(twin)
    twin.float().cpu().eval().requires_grad_(False)
    for member in members(twin).values():
        if member.is_packed:  # what is real for good is recorded as itself
            export_form(member, form)
    if getattr(getattr(twin, "config", None), "use_cache", False):
        twin.config.use_cache = False  # type: ignore[union-attr]  # a cache is no output of a graph
    return twin


class _Recorded(nn.Module):
    """A model as a function from tensors to tensors, in a fixed order."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.eval()
        self.names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
        self.fixed = {name: value for name, value in inputs.items() if name not in self.names}

    def tensors(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inputs of the graph, in order; floating-point ones in float32."""
        found = {name: inputs[name].cpu() for name in self.names}
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}

    def _fields(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = run(self.model, {**tensors, **self.fixed})
        if isinstance(found, Tensor):
            return {"output": found}
        fields = found if isinstance(found, Mapping) else {f"output_{i}": value for i, value in enumerate(found)}
        return {name: value for name, value in fields.items() if isinstance(value, Tensor)}

    def outputs(self, inputs: Mapping[str, Any]) -> list[str]:
        """Names of the graph's outputs."""
        with torch.no_grad():
            return list(self._fields(self.tensors(inputs)))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._fields(dict(zip(self.names, tensors, strict=True))).values())


def _optimize(graph: Any) -> None:
    """Clean the graph up, and leave weights as they are: folding would write the bytes they come to into the file."""
    from onnx_ir import DataType
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, DeduplicateInitializersPass
    from onnxscript.optimizer import optimize_ir

    def should_fold(node: Any) -> bool | None:
        packed = any(value is not None and value.dtype in (DataType.UINT8, DataType.INT8) for value in node.inputs)
        return False if packed else None

    DeduplicateInitializersPass(size_limit=2**12)(graph)  # the table
    optimize_ir(graph, should_fold=should_fold)
    for node in graph.graph:
        if node.op_type == "Add" and any(use.node.op_type == "LayerNormalization" for use in node.outputs[0].uses()):
            # The same sum. onnxruntime would fuse an Add with the norm, into an operator that takes longer than both.
            node.op_type = "Sum"
    ClearMetadataAndDocStringPass()(graph)  # stack traces, the larger part of a small file
    for value in list(graph.graph.initializers.values()):
        value.name = value.name.removeprefix("model.")  # that of the wrapper: here names are the checkpoint's

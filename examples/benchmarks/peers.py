"""What else runs a layer or a model on a CPU, as contenders: onnxruntime, in float32 and int8, and bnn-lab."""

import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ONNX, ONNX_INT8, BNN_LAB = "onnxruntime", "onnxruntime int8", "bnn-lab"
COLUMNS = {"onnxruntime": [ONNX, ONNX_INT8], "bnn-lab": [BNN_LAB]}
"""The contenders of each peer that can be asked for."""
Calls = dict[str, Callable[[], Any]]


def calls_of(peers: list[str], plain: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> Calls:
    """How each peer that was asked for runs a plain layer or model on these inputs.

    Raises:
        SystemExit: a peer is not installed.
    """
    found: Calls = {}
    if "onnxruntime" in peers:
        found.update(_onnxruntime(plain, inputs))
    if "bnn-lab" in peers and isinstance(plain, nn.Linear) and isinstance(inputs, Tensor):
        found.update(_bnn_lab(plain, inputs))
    return found


def _onnxruntime(plain: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> Calls:
    """Exported by torch; int8 is onnxruntime's dynamic quantization of matrix products."""
    try:
        import onnxruntime
        from onnxruntime.quantization import quantize_dynamic
    except ImportError as error:
        raise SystemExit('--peers onnxruntime needs it: pip install -e ".[onnx]"') from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    found: Calls = {}
    for chatty in (None, "torch.onnx", "onnxscript"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path, int8 = Path(folder, "plain.onnx"), Path(folder, "int8.onnx")
        args, kwargs = ((inputs,), None) if isinstance(inputs, Tensor) else ((), dict(inputs))
        # The export reads shapes by torch's own tensors, which inference mode does not make.
        with torch.inference_mode(False), torch.no_grad():
            args, kwargs = torch.utils._pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
            torch.onnx.export(plain.eval(), args, str(path), kwargs=kwargs, external_data=False, verbose=False)
        files = {ONNX: path}
        if not any(isinstance(module, nn.Conv2d) for module in plain.modules()):  # it quantizes matrix products alone
            quantize_dynamic(path, int8, op_types_to_quantize=["MatMul", "Gemm"])
            files[ONNX_INT8] = int8
        for name, file in files.items():
            session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            names = [entry.name for entry in session.get_inputs()]
            feed = {name: (inputs if isinstance(inputs, Tensor) else inputs[name]).numpy() for name in names}
            found[name] = lambda session=session, feed=feed: session.run(None, feed)
    return found


def _bnn_lab(plain: nn.Linear, x: Tensor) -> Calls:
    """Its packed XNOR layer, which takes the sign of the input at 0 and one scale a layer."""
    try:
        from bnn.kernels import set_num_threads
        from bnn.wrap.packed_linear import PackedBinaryXNORLinear
    except ImportError as error:
        raise SystemExit("--peers bnn-lab needs it: pip install --no-deps bnn-lab==1.0.0") from error
    set_num_threads(torch.get_num_threads())
    layer = PackedBinaryXNORLinear(plain.weight, plain.bias)
    return {BNN_LAB: lambda: layer(x)}

"""Which exporters take a binary model, and how close to torch its answers are in each one's runtime.

    python examples/benchmarks/exporters.py                     # every way that is installed, a few minutes
    python examples/benchmarks/exporters.py --ways torch.onnx OnnxExporter --models bert --attention binarize

Small models with random weights, frozen (latent weights) and packed (bits), each exported, saved, loaded by its
runtime, and run on another batch than the example. A cell holds the mean difference of the logits from the model's
own, over their mean size; "not installed", where a package is missing; or what the exporter says. Prints a Markdown
table.

ExecuTorch: pip install executorch. OpenVINO: pip install openvino. AOTInductor needs a C++ compiler.
"""

import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from stompp_hf import Progression, StoMPPConfig, binarize_model, calibrate, fuse_for_inference, pack_model

Inputs = dict[str, Tensor]
Run = Callable[[Inputs], Any]
"""What a runtime makes of a batch: the logits."""

BODY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
PARTS = {"depths": [1, 1], "embedding_size": 16, "hidden_sizes": [64, 128], "layer_type": "basic"}
MODELS: dict[str, tuple[Any, Any]] = {
    "bert": (BertForSequenceClassification, BertConfig(vocab_size=100, **BODY)),
    "vit": (ViTForImageClassification, ViTConfig(image_size=32, patch_size=8, **BODY)),
    "resnet": (ResNetForImageClassification, ResNetConfig(**PARTS)),
    "llama": (LlamaForCausalLM, LlamaConfig(vocab_size=100, num_key_value_heads=2, use_cache=False, **BODY)),
}
FORMATS = ("frozen", "packed", "fused")
BATCH, TOKENS = 2, 16


@dataclass
class Arguments:
    """What is exported, and how."""

    ways: list[str] = field(default_factory=lambda: list(WAYS), metadata={"help": "Exporters."})
    models: list[str] = field(default_factory=lambda: list(MODELS), metadata={"help": "Models."})
    formats: list[str] = field(default_factory=lambda: list(FORMATS[:2]), metadata={"help": f"Of {FORMATS}."})
    binarize: str = field(default="weights_and_activations", metadata={"help": "or weights (W1A32)."})
    attention: str = field(default=StoMPPConfig.attention, metadata={"help": "or binarize."})
    whole_errors: bool = field(default=False, metadata={"help": "Print what an exporter says in full."})


def batch(model: Any, seed: int) -> Inputs:
    """Inputs of a model."""
    torch.manual_seed(seed)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(BATCH, 3, 32, 32)}
    ids = torch.randint(1, 100, (BATCH, TOKENS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def build(name: str, form: str, args: Arguments) -> Any:
    """A binary model in this form."""
    torch.manual_seed(0)
    cls, shapes = MODELS[name]
    plain = cls(copy.deepcopy(shapes))
    config = StoMPPConfig(end=0.0, binarize=args.binarize, attention=args.attention)
    model: Any = binarize_model(plain, config, batch(plain, 1))
    Progression(model, 1).step(0)
    calibrate(model, [batch(model, 1)]).eval()
    if form != "frozen":
        pack_model(model)
    if form == "fused":
        fuse_for_inference(model, batch(model, 1))
    return model.requires_grad_(False)


# ---- the ways: each exports a model with an example, into a folder, and gives what runs the file ----


def torch_export(model: nn.Module, inputs: Inputs, folder: Path) -> Run:
    """A program of torch.export, in torch."""
    torch.export.save(torch.export.export(model, (), inputs), folder / "model.pt2")
    program = torch.export.load(folder / "model.pt2").module()
    return lambda batch: program(**batch).logits


def decomposed(model: nn.Module, inputs: Inputs, folder: Path) -> Run:
    """The same in core operators, which is what a torch without this library can load."""
    program = torch.export.export(model, (), inputs).run_decompositions()
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    foreign = {name for name in operators if not name.startswith(("aten.", "<built-in", "<function"))}
    if foreign:
        raise RuntimeError(f"operators that are not torch's: {sorted(foreign)}")
    torch.export.save(program, folder / "model.pt2")
    loaded = torch.export.load(folder / "model.pt2").module()
    return lambda batch: loaded(**batch).logits


def aot_inductor(model: nn.Module, inputs: Inputs, folder: Path) -> Run:
    """A compiled library."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    path = aoti_compile_and_package(torch.export.export(model, (), inputs), package_path=str(folder / "model.pt2"))
    loaded = aoti_load_package(path)
    return lambda batch: loaded(**batch).logits


def torch_onnx(model: nn.Module, inputs: Inputs, folder: Path) -> Run:
    """torch's own ONNX file, in onnxruntime."""
    import onnxruntime

    path = str(folder / "model.onnx")
    torch.onnx.export(model, (), path, kwargs=inputs, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = {given.name for given in session.get_inputs()}
    return lambda batch: torch.from_numpy(
        session.run(None, {name: tensor.numpy() for name, tensor in batch.items() if name in names})[0]
    )


def of_transformers(name: str, **options: Any) -> Callable[[nn.Module, Inputs, Path], Run]:
    """One of transformers' exporters."""

    def export(model: nn.Module, inputs: Inputs, folder: Path) -> Run:
        from transformers import exporters

        exporter = getattr(exporters, f"{name}Exporter")()
        exported = exporter.export(model, inputs, config=getattr(exporters, f"{name}Config")(**options))
        exported.save_pretrained(folder)
        loaded = type(exported).from_pretrained(folder)
        return lambda batch: loaded(**batch)["logits"]

    return export


WAYS: dict[str, Callable[[nn.Module, Inputs, Path], Run]] = {
    "torch.export": torch_export,
    "torch.export, decomposed": decomposed,
    "AOTInductor": aot_inductor,
    "torch.onnx": torch_onnx,
    "DynamoExporter": of_transformers("Dynamo"),
    "OnnxExporter": of_transformers("Onnx"),
    "ExecutorchExporter": of_transformers("Executorch", backend="xnnpack"),
    "OpenVINOExporter": of_transformers("OpenVINO"),
}


def cell(way: str, model: Any, whole: bool) -> str:
    """How far the exported model's answers are from the model's own, or what went wrong."""
    other = batch(model, 2)
    expected = model(**other).logits
    with tempfile.TemporaryDirectory() as folder:
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                found = WAYS[way](model, batch(model, 1), Path(folder))({name: t.clone() for name, t in other.items()})
        except ImportError as error:
            return f"not installed: {error}" if whole else "not installed"
        except Exception as error:  # whatever a backend raises is what is asked for
            return f"{type(error).__name__}: {error}" if whole else type(error).__name__
    return (
        f"{(found - expected).abs().mean() / expected.abs().mean():.0e}" if found.shape == expected.shape else "shape"
    )


def main() -> None:
    """Print the table."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_grad_enabled(False)
    columns = [(name, form) for name in args.models for form in args.formats]
    models = {column: build(*column, args) for column in columns}
    print(f"| | {' | '.join(f'{name}, {form}' for name, form in columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for way in args.ways:
        cells = [cell(way, copy.deepcopy(models[column]), args.whole_errors) for column in columns]
        print(f"| {way} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""export_gguf: a frozen W1A32 model as a GGUF file for llama.cpp, its binary weights as Q1_0.

The package gguf writes the file and names the tensors; what is ours is what a binary weight becomes, and to refuse what
llama.cpp would compute otherwise.
"""

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from ..errors import ExportError, ExtraError, NotBinarizedError
from ..integrations.sharding import GATHER, refuse_sharded
from ..integrations.torch import modules_of
from ..modules import BinaryLayer, Member
from .arguments import check_choices, completed, refuse_folder
from .gguf_architectures import Fields, architecture_of
from .gguf_tensors import gguf_tensors
from .gguf_tokenizers import load_tokenizer, vocabulary

Binary = Literal["q1_0", "q8_0", "float16", "float32"]
Real = Literal["float16", "float32", "q8_0"]
Pooling = Literal["mean", "cls", "none"]
CHOICES: dict[str, tuple[str, ...]] = {"binary": get_args(Binary), "real": get_args(Real), "pooling": get_args(Pooling)}
"""The options of form and their values, the first of which is the default."""
FILE_TYPE = {"q1_0": "MOSTLY_Q1_0", "q8_0": "MOSTLY_Q8_0", "float16": "MOSTLY_F16", "float32": "ALL_F32"}


def export_gguf(
    model: nn.Module,
    path: str | os.PathLike[str],
    tokenizer: Any,
    *,
    binary: Binary = "q1_0",
    real: Real = "float16",
    pooling: Pooling | None = None,
    pre: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a frozen or packed W1A32 model as a GGUF file, which llama.cpp runs; the model is not changed.

    A binary weight becomes Q1_0: its signs, and a float16 scale for each 128 inputs of a row (that of the row, of the
    layer, or of the group). Rounding scales to float16 is all that the file loses of it. Where a fan-in (or the size of
    a group) is no multiple of 128 it becomes Q4_0, with the same signs, and where 32 does not divide it either,
    float16; a warning names the layers.
    llama.cpp of late April 2026 (b8929) or later reads Q1_0. It rounds activations to 8 bits, as for all its integer
    types. Returns the file's path.

    Args:
        model: Llama, Mistral, Qwen2, Qwen3, Gemma or Gemma 3 (text) for causal LM, GPT2LMHeadModel, or BertModel, with
            every stage frozen; or a packed one.
        path: of the file. It is there once it is complete.
        tokenizer: the model's, with a tokenizer.json: byte-level BPE, BPE in the manner of SentencePiece, or WordPiece.
            Or the folder that has it.
        binary: how binary weights are written: "q1_0"; or "q8_0", "float16" or "float32", each many times as large, for
            an older llama.cpp, or to compare.
        real: how embeddings, heads and other real matrices are written: "float16", "float32" or "q8_0". Norms, biases,
            and BERT's positions and types are always float32; an int8 table of `pack_model` becomes Q8_0, with the same
            numbers, unless this is "float32".
        pooling: of an embedding model, which the file names: "mean" (the default), "cls" or "none".
        pre: llama.cpp's name of how a byte-level tokenizer splits text into words (tokenizer.ggml.pre), where it is
            not known.
        overwrite: replace a file that is there.

    Raises:
        ExtraError: the package gguf is missing.
        ExportError: the path exists; or llama.cpp cannot compute this model: its activations are binary, a stage is not
            frozen, its architecture is not known or its config asks for more than llama.cpp does, it has adapters, ties
            or tensors that have no place, a scale is beyond float16, or the tokenizer is of another kind.
        NotBinarizedError: it has no binary layers.
        NonFiniteError: a weight or a scale is NaN or infinite.
        ShardingError: its parameters are sharded over processes.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ExtraError("export_gguf needs gguf: pip install 'stompp-hf[gguf]', or pip install 'gguf>=0.19'.")
    from gguf import LlamaFileType, PoolingType

    path = Path(path)
    refuse_sharded(model, "export_gguf", GATHER)
    pooled = pooling or CHOICES["pooling"][0]
    check_choices("export_gguf", {"binary": binary, "real": real, "pooling": pooled}, CHOICES)
    refuse_folder("export_gguf", path, "model.gguf")
    if path.exists() and not overwrite:
        raise ExportError(f"export_gguf: {path} exists; give another name, or overwrite=True to replace it.")
    _check_members(model)
    architecture = architecture_of(model)
    _check_ties(model)
    if pooling and not architecture.embeds:
        raise ExportError(f"export_gguf: pooling={pooling!r} is for embedding models; leave it out for this one.")
    model_: Any = model
    fields = {
        "name": Path(model_.name_or_path).name or type(model).__name__,
        **architecture.fields(model_.config),
        **vocabulary(load_tokenizer(tokenizer), model_.get_input_embeddings().num_embeddings, pre),
    }
    if architecture.embeds:
        fields["pooling_type"] = PoolingType[pooled.upper()]
    tensors = gguf_tensors(model_, architecture, binary, real)
    with completed(path) as part:
        _write(part, architecture.name, {**fields, "file_type": LlamaFileType[FILE_TYPE[binary]]}, tensors)
    return path


# ---- what is refused ----


def _check_members(model: nn.Module) -> None:
    modules = dict(model.named_modules())
    adapters = [name for name, module in modules.items() if {"base_layer", "original_module"} & set(modules_of(module))]
    if adapters:
        raise ExportError(
            f"export_gguf: {adapters[0]} has a PEFT adapter, which a binary weight cannot take in. Take adapters off, "
            "model = peft_model.unload(), and export the model that is left; or export_onnx, which keeps them."
        )
    found = {name: module for name, module in modules.items() if isinstance(module, Member)}
    if not found:
        raise NotBinarizedError(
            f"export_gguf: {type(model).__name__} has no binary layers. binarize_model(model, "
            "StoMPPConfig(binarize='weights')) and training come first; llama.cpp's own convert_hf_to_gguf.py writes "
            "models in full precision."
        )
    binary = {name: member for name, member in found.items() if not member.always_real}
    if not binary:
        raise ExportError("export_gguf: binarize='nothing', or last_stage=0, leaves every weight of this model real.")
    for name, member in binary.items():
        if member.stompp_config.binary_activations or not isinstance(member, BinaryLayer):
            raise ExportError(
                f"export_gguf: {name} takes the sign of its activations, and llama.cpp has none. Train with "
                "StoMPPConfig(binarize='weights'), or stompp_hf.export_onnx(model, path)."
            )
        if not member.is_settled:
            raise ExportError(
                f"export_gguf: {name} is not frozen yet ({member.stage_state}), so its weight is not binary. Train to "
                "the end of the run, or pack_model(model, commit=True) to freeze it now, untrained."
            )


def _check_ties(model: Any) -> None:
    """The head may be the table, which llama.cpp takes for one that is left out; nothing else may be shared."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    head = model.get_output_embeddings()
    for tied in (tied for tied in names.values() if len(tied) > 1):
        owners = {model.get_submodule(name.rpartition(".")[0]) for name in tied}
        if owners != {model.get_input_embeddings(), head} or isinstance(head, BinaryLayer):
            raise ExportError(
                f"export_gguf: {' and '.join(tied)} are tied, and one of them is binary or has no other place in the "
                "file. Untie them before binarize_model: give each module a parameter of its own (a head: "
                "from_pretrained(..., tie_word_embeddings=False))."
            )


# ---- the file ----


def _write(path: Path, architecture: str, fields: Fields, tensors: Iterable[tuple[str, Any, str]]) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, architecture)
    for name, value in fields.items():
        if "." in name:  # a key that the writer has no method for
            writer.add_bool(name, value)
        else:
            getattr(writer, f"add_{name}")(value)
    for name, rows, kind in tensors:
        writer.add_tensor(name, rows, raw_dtype=GGMLQuantizationType[kind])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()

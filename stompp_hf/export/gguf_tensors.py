"""What a GGUF file holds of a model: its tensors under llama.cpp's names, in the types and the form that it wants."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import ExportError, NonFiniteError
from ..method.sign_bits import SignBits
from ..method.weight_scales import is_grouped
from ..modules import OWN_TENSORS, BinaryEmbedding, BinaryLayer
from ..modules.int8_embedding import Int8Embedding
from .gguf_architectures import Architecture
from .gguf_blocks import F16, F32, Q1_0, Q4_0, Q8_0, SMALLEST_NORMAL, BinaryWeight, Held, Int8Weight, RealWeight, Rows

logger = logging.getLogger(__name__)

KINDS = {"q1_0": (Q1_0, Q4_0, F16), "q8_0": (Q8_0, F16), "float16": (F16,), "float32": (F32,)}
"""What a matrix becomes: the first into whose blocks its rows fit."""
ALWAYS_FLOAT32 = ("position_embd.weight", "token_types.weight")
LARGEST = torch.finfo(torch.float16).max


def gguf_tensors(model: Any, architecture: Architecture, binary: str, real: str) -> Iterator[tuple[str, Rows, str]]:
    """The name, the rows and the type of each tensor; see `export_gguf`.

    Raises:
        ExportError: a tensor has no place in the architecture, or a value is beyond float16.
        NonFiniteError: a value is NaN or infinite.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = get_tensor_name_map(number, model.config.num_hidden_layers)
    other: dict[str, list[str]] = {}
    for own, held in _held(model):
        if own.startswith(architecture.left_out):
            continue
        name = names.get_name(own, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ExportError(
                f"export_gguf: llama.cpp's {architecture.name} has no place for {own}, so the file would compute "
                "something else. stompp_hf.export_onnx(model, path) takes it along."
            )
        order = architecture.row_order(own, len(getattr(held, held.rounded)), model.config)
        held = held if order is None else held[order]
        if architecture.norm_offset and isinstance(held, RealWeight) and own.endswith("norm.weight"):
            held = RealWeight(held.values + architecture.norm_offset)
        wanted = _wanted(name, held, binary, real)
        kind = next(kind for kind in wanted if held.fits(kind))
        _check_range(own, held, kind)
        if isinstance(held, BinaryWeight) and kind != wanted[0]:
            other.setdefault(kind, []).append(own)
        yield name, held.stored(kind), kind
    for name, tensor in architecture.tensors(model.config).items():
        yield name, RealWeight(tensor.float()).stored(F32), F32
    for kind, fallen in other.items():
        logger.warning(
            "export_gguf: %d binary weights are written as %s, since their rows, or their groups of scales, are not "
            "whole blocks of %s: %s.",
            *(len(fallen), kind, KINDS[binary][0], ", ".join(fallen)),
        )


def _held(model: nn.Module) -> Iterator[tuple[str, Held]]:
    """Every tensor of a model, by the name that it has in transformers; tied ones once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        own: tuple[str, ...] = OWN_TENSORS if isinstance(module, BinaryLayer) else ()
        if isinstance(module, BinaryLayer) and not module.always_real:
            own = (*own, module.weight_name)
            yield f"{start}weight", _binary(f"{start}weight", module)
        elif isinstance(module, Int8Embedding):
            yield f"{start}weight", Int8Weight(_here(module.weight_int8), _here(module.weight_step).float())
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or name in own:
                continue
            seen.add(id(parameter))
            values = _here(parameter).float()
            yield f"{start}{name}", RealWeight(values.T if isinstance(module, Conv1D) and name == "weight" else values)


def _binary(name: str, layer: Any) -> BinaryWeight:
    latent = layer.latent
    if latent is not None and not bool(latent.detach().isfinite().all()):
        raise NonFiniteError(
            f"export_gguf: {name} is not finite, and its signs mean nothing. Load the last checkpoint from before it "
            "became so."
        )
    dim = layer.product.channel_dim
    packed = latent is None
    signs = SignBits(layer.weight_bits, layer.weight_shape, dim) if packed else SignBits.of(latent, dim)
    scale, grouped = _here(layer.weight_scale).float(), is_grouped(layer.weight_scale)
    scale = scale if grouped else scale.expand(len(signs.bits)).unsqueeze(1)
    if isinstance(layer, BinaryEmbedding) and layer.padding_idx is not None and not bool(layer.padding_row_lives()):
        scale = scale.clone()
        scale[layer.padding_idx] = 0.0
    group_size = layer.stompp_config.group_size if grouped else signs.fan_in
    return BinaryWeight(_here(signs.bits), scale, signs.fan_in, group_size)


def _here(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


def _wanted(name: str, held: Held, binary: str, real: str) -> tuple[str, ...]:
    """The types that a tensor may have, the best first."""
    if isinstance(held, BinaryWeight):
        return KINDS[binary]
    if isinstance(held, Int8Weight):
        return KINDS["q8_0" if real != "float32" else real]
    return (F32,) if held.values.dim() == 1 or name in ALWAYS_FLOAT32 else KINDS[real]


def _check_range(name: str, held: Held, kind: str) -> None:
    """llama.cpp loads a NaN in silence, and prints nonsense."""
    size = getattr(held, held.rounded).abs()
    if not bool(size.isfinite().all()):
        raise NonFiniteError(
            f"export_gguf: the {held.rounded} of {name} is NaN or infinite. Load the last checkpoint from before it "
            "became so."
        )
    if kind != F32 and float(size.max()) > LARGEST:
        option = "binary" if isinstance(held, BinaryWeight) else "real"
        raise ExportError(
            f"export_gguf: the {held.rounded} of {name} goes to {float(size.max()):.3g}, which is beyond float16 "
            f"(65504). {option}='float32' takes it; or look at why training let it grow so."
        )
    if kind != F32 and isinstance(held, BinaryWeight) and bool(((size > 0) & (size < SMALLEST_NORMAL)).any()):
        logger.warning("export_gguf: a scale of %s is so small (%.1e) that float16 cuts digits off.", name, size.min())

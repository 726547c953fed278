"""What a checkpoint folder holds: which of its tensors are bits, how many bytes each kind takes, how much smaller."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from .config import METHOD
from .errors import CheckpointError
from .modules import OWN_TENSORS
from .plan import Plan
from .quantization_config import StoMPPQuantizationConfig

BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}


@dataclass
class Inspection:
    """What was found in a folder; sizes in bytes, of tensors on disk.

    bits and scales: of the binary weights; latents: of binary weights that are not packed; added: thresholds, clips,
    activation scales, states; real: everything else; as_float32: what a plain float32 checkpoint of the model takes.
    """

    architecture: str
    plan: Plan
    sizes: dict[str, int] = field(default_factory=dict)
    by_dtype: dict[str, int] = field(default_factory=dict)
    as_float32: int = 0
    binary_as_float32: int = 0

    @property
    def total(self) -> int:
        """All tensors."""
        return sum(self.by_dtype.values())

    def __str__(self) -> str:
        plan, sizes = self.plan, self.sizes
        kinds = [f"{len(plan.of_kind(kind))} {kind}s" for kind in ("layer", "embedding", "attention")]
        kinds = [kind for kind in kinds if not kind.startswith("0 ")]
        lines = [
            f"{self.architecture}: {', '.join(kinds)} binary ({plan.config.binarize}), {plan.stage_count} stages, "
            f"{'packed: 8 weights a byte' if plan.packed else 'training format: latent weights'}",
            *(f"  {name:<38}{size:>14,} bytes" for name, size in sizes.items() if size),
            f"  {'all tensors':<38}{self.total:>14,} bytes ("
            + ", ".join(f"{dtype} {size:,}" for dtype, size in sorted(self.by_dtype.items()))
            + ")",
            f"  {'as plain float32':<38}{self.as_float32:>14,} bytes: {self.as_float32 / max(1, self.total):.1f} times",
        ]
        binary = sizes["bits"] + sizes["weight scales"]
        if plan.packed and binary:
            lines.append(
                f"  binary weights alone, with their scales: {self.binary_as_float32 / binary:.1f} times smaller"
            )
        lines += [f"  real: {name}: {reason}" for name, reason in plan.left.items()]
        return "\n".join(lines)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint of ours.

    Raises:
        CheckpointError: no checkpoint, not one of ours, or damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it has no config.json. Give the folder of save_pretrained.")
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise CheckpointError(
            f"{folder} is no checkpoint of stompp_hf: its config.json names no binary layers. Binarize and train first "
            "(stompp_hf.binarize_model), then save_pretrained."
        )
    return config  # type: ignore[no-any-return]


def inspect(folder: str | Path) -> Inspection:
    """Read config.json and the headers of the safetensors files; no weight is loaded.

    Raises:
        CheckpointError: no checkpoint, not one of ours, or damaged.
    """
    folder = Path(folder)
    config = read_config(folder)
    plan = StoMPPQuantizationConfig(**config["quantization_config"]).plan()
    found = Inspection((config.get("architectures") or ["model"])[0], plan)
    found.sizes = dict.fromkeys(("bits", "weight scales", "latent weights", "other binary parts", "real"), 0)
    names = {entry.name for entry in plan.entries}
    for name, dtype, shape in _headers(folder):
        owner, _, own = name.rpartition(".")
        size = math.prod(shape) * BYTES[dtype]
        found.by_dtype[dtype] = found.by_dtype.get(dtype, 0) + size
        found.sizes[_kind(owner in names, own)] += size
    plain = _plain_model(folder, found.architecture)
    found.as_float32 = 4 * sum(p.numel() for p in plain.parameters())
    found.binary_as_float32 = 4 * sum(
        p.numel() for n, p in plain.named_parameters() if n in {f"{m}.weight" for m in names}
    )
    return found


def _plain_model(folder: Path, architecture: str) -> Any:
    """The model without binary layers, on the meta device: shapes, and no memory."""
    cls = getattr(transformers, architecture, None)
    if cls is None:
        raise CheckpointError(f"{folder}: transformers has no class {architecture}; it may need trust_remote_code.")
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    with torch.device("meta"):
        return cls(config)


def _kind(binary: bool, own: str) -> str:
    if binary and own == "weight_bits":
        return "bits"
    if binary and own == "weight_scale":
        return "weight scales"
    if binary and own == "weight":
        return "latent weights"
    return "other binary parts" if binary and own in (*OWN_TENSORS, "padding_lives") else "real"


def _headers(folder: Path) -> Any:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no .safetensors file.")
    for path in files:
        try:
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # no mapping
                    part = file.get_slice(name)
                    yield name, part.get_dtype(), part.get_shape()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or cut off: {error}.") from error

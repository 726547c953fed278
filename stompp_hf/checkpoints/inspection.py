"""What a checkpoint folder holds: which of its tensors are bits, how many bytes each kind takes, how much smaller."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..modules import OWN_TENSORS
from ..modules.attention import BinaryAttention
from ..surgery.plan import FLOAT32, INT8, Plan
from ..surgery.quantization_config import StoMPPQuantizationConfig
from .files import architecture, headers, model_class, read_config, weight_files

STATE = ".stompp_state"
"""Ending of the tensor that everything binary has."""
MAIN_PARTS = {"weight_bits": "bits", "weight_scale": "weight scales", "weight": "latent weights"}
OTHERS = (*OWN_TENSORS, *BinaryAttention.own_names, "padding_lives")
"""What binarization adds beside bits, scales and latents."""


@dataclass
class Inspection:
    """What was found in a folder; sizes in bytes, of tensors on disk.

    bits and scales: of the binary weights; latents: of binary weights that are not packed; added: thresholds, clips,
    activation scales, states; real: everything else; as_float32: what a plain float32 checkpoint of the model takes,
    and binary_as_float32 the weights in it that are binary here; both are 0 where the class of the model cannot be
    built, and `note` says why.
    """

    architecture: str
    plan: Plan
    sizes: dict[str, int] = field(default_factory=dict)
    by_dtype: dict[str, int] = field(default_factory=dict)
    as_float32: int = 0
    binary_as_float32: int = 0
    note: str = ""

    @property
    def total(self) -> int:
        """All tensors."""
        return sum(self.by_dtype.values())

    def __str__(self) -> str:
        plan, sizes = self.plan, self.sizes
        kinds = [f"{len(plan.of_kind(kind))} {kind}s" for kind in ("layer", "embedding", "attention")]
        kinds = [kind for kind in kinds if not kind.startswith("0 ")]
        lines = [
            f"{self.architecture}: {', '.join(kinds)} binary ({plan.config.binarize}), {plan.stages_in_words}, "
            f"{'packed: 8 weights a byte' if plan.packed else 'training format: latent weights'}",
            *(f"  {name:<38}{size:>14,} bytes" for name, size in sizes.items() if size),
            f"  {'all tensors':<38}{self.total:>14,} bytes ("
            + ", ".join(f"{dtype} {size:,}" for dtype, size in sorted(self.by_dtype.items()))
            + ")",
        ]
        if self.as_float32:
            times = self.as_float32 / max(1, self.total)
            lines.append(f"  {'as plain float32':<38}{self.as_float32:>14,} bytes: {times:.1f} times")
        if plan.real != FLOAT32:
            tables = f": {len(plan.int8)} embedding tables in int8, the rest in float16" if plan.real == INT8 else ""
            lines.append(f"  real parts stored as {plan.real}{tables}")
        if self.note:
            lines.append(f"  {self.note}")
        binary = sizes["bits"] + sizes["weight scales"]
        if plan.packed and binary and self.binary_as_float32:
            lines.append(
                f"  binary weights alone, with their scales: {self.binary_as_float32 / binary:.1f} times smaller"
            )
        lines += [f"  real: {name}: {reason}" for name, reason in plan.left.items()]
        return "\n".join(lines)


def inspect(folder: str | Path) -> Inspection:
    """Read config.json and the headers of the safetensors files; no weight is loaded, and no code of the folder runs.

    Raises:
        CheckpointError: no checkpoint, not one of ours, or damaged.
    """
    folder = Path(folder)
    config = read_config(folder)
    plan = StoMPPQuantizationConfig(**config["quantization_config"]).plan()
    found = Inspection(architecture(config), plan)
    found.sizes = dict.fromkeys((*MAIN_PARTS.values(), "other binary parts", "real"), 0)
    tensors = list(headers(weight_files(folder)))
    # By what the file itself says: some classes save their tensors under other names than those of their modules.
    members = {header.name.removesuffix(STATE) for header in tensors if header.name.endswith(STATE)}
    for header in tensors:
        owner, _, own = header.name.rpartition(".")
        found.by_dtype[header.dtype] = found.by_dtype.get(header.dtype, 0) + header.size
        found.sizes[_kind(owner in members, own)] += header.size
    plain = _plain_model(folder, found)
    if plain is not None:
        latents = {f"{entry.name}.weight" for entry in plan.entries}
        found.as_float32 = 4 * sum(p.numel() for p in plain.parameters())
        found.binary_as_float32 = 4 * sum(p.numel() for name, p in plain.named_parameters() if name in latents)
    return found


def _plain_model(folder: Path, found: Inspection) -> Any:
    """The model without binary layers, on the meta device: shapes, and no memory. None where it cannot be made."""
    cls = model_class(found.architecture)
    if cls is None:
        found.note = f"transformers has no class {found.architecture}, so its plain size is not known"
        return None
    try:
        config = cls.config_class.from_pretrained(folder)
        del config.quantization_config
        with torch.device("meta"):
            return cls(config)
    except ImportError as error:
        found.note = f"its plain size is not known: {error}"
        return None
    except Exception as error:  # whatever its config does to a class that is not ours
        raise CheckpointError(f"{folder / 'config.json'} makes no {found.architecture}: {error}.") from error


def _kind(binary: bool, own: str) -> str:
    kinds = {**dict.fromkeys(OTHERS, "other binary parts"), **MAIN_PARTS}
    return kinds.get(own, "real") if binary else "real"

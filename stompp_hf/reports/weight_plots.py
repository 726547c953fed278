"""Histograms of the latent weights, stage by stage, before and after training: from two checkpoint folders."""

from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.files import read_config, read_tensors
from ..errors import RunError
from ..surgery.plan import Plan
from ..surgery.quantization_config import StoMPPQuantizationConfig
from .drawing import DARK, new_figure, short_names

SAMPLE = 65_536
"""Entries of one weight that are looked at; larger weights are sampled evenly."""
PANELS, BINS, REACH = 6, 60, 4.0


def _latents(folder: Path, plan: Plan) -> dict[str, Any]:
    """Even samples of the latent weights of the planned layers, by the names in the plan."""
    names = {entry.name for entry in plan.entries if entry.kind != "attention"}
    ends = {tuple(name.split(".")[-2:]) for name in names}
    found = {}
    for key, tensor in read_tensors(folder, lambda key: key.endswith(".weight")):
        owner = key.removesuffix(".weight")
        if tuple(owner.split(".")[-2:]) not in ends:
            continue
        # AutoModel drops a prefix such as "bert."
        same = [n for n in names if n == owner or n.endswith(f".{owner}") or owner.endswith(f".{n}")]
        if len(same) == 1:
            flat = tensor.reshape(-1).float()
            found[same[0]] = flat[:: -(-flat.numel() // SAMPLE)].numpy()
    return found


def weights(before: str | Path, after: str | Path) -> Any:
    """How the latent weights moved: a panel a stage (six at most), filled before, outlined after.

    In units of the mean |w| before, layer by layer; with the share of the weights that changed sign.

    Args:
        before: a checkpoint folder: the plain model, or an early one of the run.
        after: a later checkpoint of the same model, in the training format.

    Raises:
        CheckpointError: no checkpoint, or damaged.
        RunError: `after` is packed, or the two share no weights.
        ExtraError: matplotlib is missing.
    """
    before, after = Path(before), Path(after)
    plan = StoMPPQuantizationConfig(**read_config(after)["quantization_config"]).plan()
    if plan.packed:
        raise RunError(f"{after} is packed: it holds signs, and no latent weights. Give the training checkpoint.")
    then, now = _latents(before, plan), _latents(after, plan)
    shared = [name for name in now if name in then and now[name].shape == then[name].shape]
    if not shared:
        raise RunError(
            f"{before} and {after} share no binary layer's weight: give two checkpoints of one model in safetensors, "
            "the first before it was packed."
        )
    inward = sorted(plan.entries, key=lambda entry: entry.position)  # the model's order, whatever freezes first
    stages = [
        (title, [e.name for e in inward if e.stage_name == title and e.name in shared])
        for title in dict.fromkeys(entry.stage_name for entry in inward)
    ]
    stages = [(title, names) for title, names in stages if names]
    chosen = np.unique(np.linspace(0, len(stages) - 1, min(PANELS, len(stages))).round().astype(int))
    stages = [stages[index] for index in chosen]
    columns = min(3, len(stages)) if len(stages) != 4 else 4
    rows = -(-len(stages) // columns)
    figure, axes = new_figure(rows, columns, 1.9 * rows + 0.5, sharex=True, sharey=True)
    edges = np.linspace(-REACH, REACH, BINS + 1)
    titles = short_names([title for title, _ in stages])
    for axis, title, (_, names) in zip(axes.flat[: len(stages)], titles, stages, strict=True):
        units = [np.abs(then[name]).mean() or 1.0 for name in names]
        old, new = (
            np.concatenate([values[n] / unit for n, unit in zip(names, units, strict=True)]) for values in (then, now)
        )
        for values, style in ((old, {"fill": True, "color": "0.8"}), (new, {"color": DARK, "linewidth": 1.3})):
            counts, _ = np.histogram(values, edges)
            axis.stairs(counts / len(values), edges, **style)
        axis.axvline(0.0, color="black", linewidth=0.6)
        axis.set_title(f"{title}\n{np.mean((old >= 0) != (new >= 0)):.1%} changed sign", fontsize=9)
        axis.set_yticks([])
    for axis in axes.flat[len(stages) :]:
        axis.set_visible(False)
    figure.supxlabel("latent weight, in units of the mean |w| before: filled before, outlined after", fontsize=9)
    return figure

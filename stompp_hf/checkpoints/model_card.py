"""Model cards: how to load a checkpoint, what of it is binary, what it weighs, and what was measured."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from transformers.modelcard import TASK_MAPPING

from ..errors import CheckpointError
from .inspection import Inspection, inspect

TAGS = ("stompp", "1-bit", "binary")
CARD = "README.md"
BEGIN, END = "<!-- stompp_hf -->", "<!-- end of stompp_hf -->"
"""Around this library's part of a card, so that it can be written again."""


def model_card(
    folder: str | Path,
    *,
    metrics: Mapping[str, float] | None = None,
    base_model: str | None = None,
    repo_id: str | None = None,
) -> ModelCard:
    """The card of a checkpoint folder: the one that lies there, with this library's part added or brought up to date.

    Args:
        folder: of `save_pretrained`; sizes are those of its files.
        metrics: what was measured, by name.
        base_model: the model on the hub that this one was made from.
        repo_id: where it is to be loaded from; the folder's name if None.

    Raises:
        CheckpointError: no checkpoint of this library, or a README.md that is no card.
    """
    folder = Path(folder)
    found = inspect(folder)
    card = _existing(folder / CARD)
    data: Any = card.data
    tags = [data.tags] if isinstance(data.tags, str) else list(data.tags or [])
    data.tags = tags + [tag for tag in TAGS if tag not in tags]
    data.library_name = data.library_name or "transformers"
    data.base_model = base_model or data.base_model
    if data.base_model:  # how the hub lists it beside that model, unless the card says otherwise
        data.base_model_relation = data.get("base_model_relation") or "quantized"
    tasks = (task for task, names in TASK_MAPPING.items() if found.architecture in names.values())
    data.pipeline_tag = data.pipeline_tag or next(tasks, None)
    before, _, rest = card.text.partition(BEGIN)
    after = rest.partition(END)[2]
    name = repo_id or folder.resolve().name
    title = "" if before.strip() else f"# {name}\n\n"
    text = f"{before.rstrip()}\n\n{title}{BEGIN}\n{_part(found, name, metrics or {})}\n{END}\n{after.lstrip()}"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.lstrip()}")


def write_model_card(folder: str | Path, **options: Any) -> Path:
    """Write `model_card(folder, **options)` into the folder's README.md; returns its path."""
    card = model_card(folder, **options)
    path = Path(folder) / CARD
    path.write_text(str(card), encoding="utf-8")
    return path


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    tokenizer: Any = None,
    metrics: Mapping[str, float] | None = None,
    base_model: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload a 1-bit model",
) -> str:
    """Upload a model with its card to the hub; returns the address of the commit.

    `model.push_to_hub` uploads it with a card that does not say how to load it; everything else is the same.

    Args:
        model: a binarized or packed model.
        repo_id: "user/name"; made if it is not there.
        tokenizer: or an image processor: anything else with a save_pretrained.
        metrics, base_model: as for `model_card`.
        private, token, commit_message: as for huggingface_hub.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_model_card(folder, metrics=metrics, base_model=base_model, repo_id=repo_id)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message))


def _existing(path: Path) -> ModelCard:
    if not path.exists():
        return ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n")
    try:
        return ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except Exception as error:  # YAML's, or what huggingface_hub makes of it
        raise CheckpointError(f"{path} is no model card: {error}. Delete it to have a new one.") from error


def _part(found: Inspection, name: str, metrics: Mapping[str, float]) -> str:
    plan, cls = found.plan, found.architecture
    activations = " and activations" if plan.config.binary_activations else ""
    kinds = [f"{len(plan.of_kind(kind))} {kind}s" for kind in ("layer", "embedding", "attention") if plan.of_kind(kind)]
    reasons: dict[str, list[str]] = {}
    for module, reason in plan.left.items():
        reasons.setdefault(reason, []).append(f"`{module}`")
    sizes = [f"| {kind} | {size:,} |" for kind, size in found.sizes.items() if size]
    ratio = f", {found.as_float32 / max(1, found.total):.1f} times less than in float32" if found.as_float32 else ""
    held = "Bits stand in place of weights, 8 a byte." if plan.packed else "It holds latent weights, to train on."
    without = (
        "fills the binary layers at random"
        if plan.packed
        else "loads the latent weights as a model in full precision. Its answers look plausible and are not this "
        "model's, which is worse than random ones"
    )
    stages = plan.stage_names[: plan.freezing or None]
    binary = f"{', '.join(kinds)}, in {plan.stages_in_words}: " + ", ".join(f"`{n}`" for n in stages)
    if plan.config.binarize == "nothing":
        binary = "nothing, as a baseline in full precision"
    lines = [
        f"## Binary weights{activations}",
        "",
        f"Trained with stompp_hf (StoMPP, [arXiv 2606.27759](https://arxiv.org/abs/2606.27759)). {held}",
        "",
        "```python",
        "import stompp_hf  # registers the format: before from_pretrained, in every script",
        f"from transformers import {cls}",
        "",
        f'model = {cls}.from_pretrained("{name}")',
        "```",
        "",
        f"Without the first line transformers only logs `Unknown quantization type`, and {without}.",
        "",
        f"**Binary** ({plan.config.binarize}): {binary}.",
        "",
        "**Real**: norms, biases, embeddings that are not named above"
        + "".join(f"; {', '.join(modules)} ({reason})" for reason, modules in reasons.items())
        + (f". Stored as {plan.real}." if plan.packed else "."),
        "",
        "| tensors on disk | bytes |",
        "|---|---|",
        *sizes,
        f"| all{ratio} | {found.total:,} |",
    ]
    if metrics:
        lines += ["", "| metric | value |", "|---|---|", *(f"| {key} | {value:g} |" for key, value in metrics.items())]
    return "\n".join(lines)

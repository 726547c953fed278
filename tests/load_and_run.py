"""Load checkpoints in a process of their own, run each on its batch, and write down what they compute.

    python tests/load_and_run.py FOLDER

FOLDER/jobs.pt lists a name, a checkpoint, the class to load it with, options for from_pretrained, and a batch for each
job; the results are written to FOLDER/results.pt, by name.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import stompp_hf  # noqa: F401  # registers the format, and nothing else here needs it

HIDDEN = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")


def run(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits, if the model has a head, and all hidden states in one row; images are given in the model's dtype."""
    dtype = next(model.parameters()).dtype
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    with torch.no_grad():
        outputs: Any = model.eval()(**inputs, output_hidden_states=True)
    states = [state.flatten() for key in HIDDEN for state in outputs.get(key) or ()]
    found = {"hidden": torch.cat(states)}
    return found if outputs.get("logits") is None else {**found, "logits": outputs.logits}


def main(folder: Path) -> None:
    """Run all jobs."""
    torch.set_num_threads(1)
    results = {}
    for name, checkpoint, auto, options, batch in torch.load(folder / "jobs.pt"):
        model = getattr(transformers, auto).from_pretrained(folder / checkpoint, **options)
        results[name] = run(model, batch)
    torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

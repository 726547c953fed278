"""timm's training script, unmodified, on a model that becomes binary (marker `timm`).

TIMM_TRAIN=path/to/train.py names a copy of the real one, of the installed timm's version; without it stands for it
scripts/timm_train.py: the same order of calls, of timm's own utilities.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.timm

HERE = Path(__file__).parent
SCRIPT = os.environ.get("TIMM_TRAIN", str(HERE / "scripts" / "timm_train.py"))
PER_EPOCH, EPOCHS = 6, 2
RESNET = ("--model", "resnet18", "--model-kwargs", "channels=(8,16,16,32)")
VIT = ("--model", "vit_tiny_patch16_224", "--model-kwargs", "img_size=32", "depth=2", "embed_dim=32", "num_heads=2")
RELOAD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import torchvision_ops, launch_timm, timm
from stompp_hf import binarize_model, get_plan
from stompp_hf.surgery.members import binary_layers
results = {}
checkpoint = torch.load(sys.argv[2], weights_only=False)
for key in ("state_dict", "state_dict_ema"):
    if key in checkpoint:
        args = checkpoint["args"]
        model = timm.create_model(args.model, num_classes=args.num_classes, **args.model_kwargs)
        binarize_model(model, launch_timm.CONFIG, launch_timm.images())
        model.load_state_dict(checkpoint[key])
        if args.channels_last:  # what stays real rounds by the layout
            model.to(memory_format=torch.channels_last)
        assert {layer.stage_state for layer in binary_layers(model).values()} == {"frozen"}
        with torch.no_grad():
            results[key] = model.eval()(launch_timm.images())
torch.save(results, sys.argv[3])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes, bright and dark."""
    pytest.importorskip("timm")
    place, dice = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", PER_EPOCH * 4), ("validation", 8)):
        for label in (1, 2):
            (place / split / f"{label}").mkdir(parents=True)
            for index in range(count):
                pixels = dice.integers(0, 256, (32, 32, 3), dtype=np.uint8) // label
                Image.fromarray(pixels).save(place / split / f"{label}" / f"{index}.png")
    return place


def python(*words: str) -> str:
    paths = os.pathsep.join(map(str, (HERE.parent, HERE, HERE / "scripts")))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def train(images: Path, out: Path, *words: str, accumulate: int = 1) -> tuple[torch.Tensor, str]:
    """What the model computed at the end, and what was printed."""
    steps = -(-PER_EPOCH // accumulate) * EPOCHS
    command = [str(HERE / "scripts" / "launch_timm.py"), str(steps), str(out / "logits.pt"), SCRIPT]
    command += ["--data-dir", str(images), "--num-classes", "2", "--img-size", "32", "--batch-size", "8", "--no-aug"]
    command += ["--epochs", str(EPOCHS), "--device", "cpu", "--workers", "0", "--grad-accum-steps", str(accumulate)]
    out.mkdir(exist_ok=True)
    printed = python(*command, "--warmup-epochs", "0", "--output", str(out), "--experiment", "run", *words)
    return torch.load(out / "logits.pt"), printed


def reload(out: Path) -> dict[str, torch.Tensor]:
    """What the saved model and its average compute, in a process that builds them anew."""
    python("-c", RELOAD, str(HERE), str(out / "run" / "last.pth.tar"), str(out / "reloaded.pt"))
    return torch.load(out / "reloaded.pt")


def test_ends_binary_reloads_and_resumes(folder: Path, tmp_path: Path) -> None:
    average = ("--model-ema", "--model-ema-decay", "0.5")
    whole, printed = train(folder, tmp_path / "whole", *RESNET, *average)
    assert "step 12 of 12, complete: True" in printed
    found = reload(tmp_path / "whole")
    assert torch.equal(found["state_dict"], whole)
    assert torch.isfinite(found["state_dict_ema"]).all() and not torch.equal(found["state_dict_ema"], whole)

    _, printed = train(folder, tmp_path / "half", *RESNET, *average, "--stop-epoch", "1")
    assert "step 6 of 12, complete: False" in printed
    last = tmp_path / "half" / "run" / "last.pth.tar"
    resumed, printed = train(folder, tmp_path / "rest", *RESNET, *average, "--resume", str(last))
    assert "step 12 of 12, complete: True" in printed
    # the order of the images is drawn anew, so that the weights differ from the whole run's; what is saved does not
    assert torch.isfinite(resumed).all() and torch.equal(reload(tmp_path / "rest")["state_dict"], resumed)


@pytest.mark.parametrize(
    "words",
    [
        (*VIT, "--opt", "adamw", "--lr", "1e-3", "--clip-grad", "1.0", "--mixup", "0.2"),
        (*RESNET, "--amp", "--amp-dtype", "bfloat16", "--channels-last", "--sched-on-updates"),
    ],
    ids=["vit", "resnet"],
)
def test_with_options(words: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    logits, printed = train(folder, tmp_path, *words, accumulate=2)
    assert "step 6 of 6, complete: True" in printed
    assert torch.isfinite(logits).all() and torch.equal(reload(tmp_path)["state_dict"], logits)

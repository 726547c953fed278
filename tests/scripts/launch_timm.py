"""Run a training script of timm as it is, on a model that becomes binary.

    python launch_timm.py STEPS LOGITS TRAIN.PY [options of train.py]

What a user would write into train.py stands here: one line where the model is made, two where training begins, one
after each update. STEPS is the number of updates of the whole run; what the model computes at the end, on images of a
fixed seed, is written to LOGITS.
"""

import runpy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import torchvision_ops  # noqa: F401, I001  # before timm
import timm.models
import timm.optim
from models import assert_binary

from stompp_hf import Progression, StoMPPConfig, binarize_model
from stompp_hf.surgery.members import binary_layers

CONFIG = StoMPPConfig(refresh_rate=2, end=0.9)


def images(size: int = 32) -> torch.Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(5))


def main() -> None:
    steps, logits = int(sys.argv[1]), Path(sys.argv[2])
    sys.argv = sys.argv[3:]
    plain_model, plain_optimizer = timm.models.create_model, timm.optim.create_optimizer_v2
    made: dict = {}

    def create_model(*args, **kwargs):
        made["model"] = binarize_model(plain_model(*args, **kwargs), CONFIG, images())
        made["handle"] = made["model"].register_forward_pre_hook(begin)
        return made["model"]

    def create_optimizer_v2(*args, **kwargs):
        made["optimizer"] = plain_optimizer(*args, **kwargs)
        return made["optimizer"]

    def begin(module, args):
        """The first forward of training: a checkpoint, if there is one, is loaded by now."""
        if module is made["model"] and module.training:
            made["handle"].remove()
            progression = made["progression"] = Progression(module, steps)
            progression.attach(made["optimizer"])
            made["optimizer"].register_step_post_hook(lambda *_: progression.step(progression.current_step + 1))
            progression.step(progression.current_step)

    timm.create_model = timm.models.create_model = create_model
    timm.optim.create_optimizer_v2 = create_optimizer_v2
    runpy.run_path(sys.argv[0], run_name="__main__")
    model, progression = made["model"].eval(), made["progression"]
    with torch.no_grad():
        torch.save(model(images()), logits)
    print(f"step {progression.current_step} of {steps}, complete: {progression.is_complete()}")
    if progression.is_complete():
        for layer in binary_layers(model).values():
            assert layer.stage_state == "frozen"
            assert_binary(layer)


if __name__ == "__main__":
    main()

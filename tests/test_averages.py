"""Averages of a model's tensors, as timm's --model-ema keeps them: floating buffers too, and whole numbers copied."""

import copy

import pytest
import torch
from models import CASES, assert_binary, logits, quick, train

from stompp_hf import Progression, binarize_model, pack_model
from stompp_hf.surgery.members import binary_layers


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9998])
@pytest.mark.parametrize("options", [{}, {"activation_clip": 2.0, "weight_clip": 1.0}, {"attention": "binarize"}])
def test_an_average_over_everything_is_a_model(decay: float, options: dict) -> None:
    case = CASES["bert"]
    model = binarize_model(case.build(), quick(**options))
    average = copy.deepcopy(model).eval()
    for step in range(12):
        train(model, case, step, step + 1, 12)
        with torch.no_grad():
            for mean, now in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                if now.is_floating_point():
                    mean.lerp_(now, 1.0 - decay)
                else:
                    mean.copy_(now)
        with torch.inference_mode(step % 2 == 0):
            assert torch.isfinite(logits(average, case.batch(50))).all()
    assert Progression(average, 12).is_complete()
    for layer in binary_layers(average).values():
        assert layer.stage_state == "frozen"
        assert_binary(layer)
    frozen = logits(average, case.batch(50))
    assert decay > 0 or torch.equal(frozen, logits(model, case.batch(50)))
    assert torch.equal(logits(pack_model(average), case.batch(50)), frozen)

"""A small convolutional net through its progression: what must hold of the masks, the optimizer, and the gradients.

The invariants are numbered as in the project's design: 3 frozen means frozen, 5 a pure function of the step, 6 the
mask tracks the schedule, 7 evaluation is deterministic. Those of a single layer (1, 2, 4) are in test_conv.py.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import same_tensors
from stack import random_states
from torch import Tensor
from vision import ConvNet, conv_net, images, loss_of, train

from stompp_hf import BinaryConv2d, Progression, StoMPPConfig, binarize_model
from stompp_hf.errors import ConfigError, ShapeError
from stompp_hf.method.schedules import frozen_fraction
from stompp_hf.surgery.members import binary_layers
from stompp_hf.training.metrics import blocked_unfrozen, blocked_upstream, gradient_flow

TOTAL, WINDOW, STAGES = 24, 6, 4
NAMES = [f"blocks.{index}.1" for index in range(STAGES)]
FIXED = {"learn_weight_scale": False, "learn_activation_scale": False, "learn_activation_threshold": False}
ADAMW = (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1})
SGD = (torch.optim.SGD, {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.1})
optimizers = pytest.mark.parametrize(("kind", "options"), [ADAMW, SGD], ids=["adamw", "sgd"])


def frozen_signs(model: ConvNet) -> list[tuple[Tensor, Tensor]]:
    """For each layer: which entries are frozen now, and all signs."""
    found = []
    for layer in binary_layers(model).values():
        frozen = torch.full(layer.weight.shape, layer.stage_state == "frozen")
        found.append((frozen if layer.weight_mask is None else layer.weight_mask.clone(), layer.weight.detach() >= 0))
    return found


# ---- invariant 3: STE-free, the sign of a frozen entry stays, whatever the optimizer does ----


def flips(regime: str, held: bool, kind: type, options: dict[str, Any]) -> tuple[int, int]:
    """Sign changes of entries frozen at both of two steps, and of the others."""
    model = conv_net(frozen_gradient=regime)
    progression, optimizer = Progression(model, TOTAL), kind(model.parameters(), **options)
    if held:
        progression.attach(optimizer)
    kept = free = 0
    before = None
    for step in range(TOTAL + 16):
        progression.step(step)
        now = frozen_signs(model)
        for (frozen, sign), (was_frozen, was) in zip(now, before or now, strict=True):
            kept += int((frozen & was_frozen & (sign != was)).sum())
            free += int((~(frozen & was_frozen) & (sign != was)).sum())
        before = now
        loss_of(model, step).backward()
        optimizer.step()
        for parameter in model.parameters():  # gradients of 0, as under DDP: inertia and decay go on
            parameter.grad = torch.zeros_like(parameter)
    return kept, free


@optimizers
def test_frozen_means_frozen(kind: type, options: dict[str, Any]) -> None:
    kept, free = flips("zero", True, kind, options)
    assert kept == 0 and free > 0
    assert flips("zero", False, kind, options)[0] > 0  # inertia and decay alone do it
    assert flips("ste", True, kind, options)[0] > 0  # with the surrogate, frozen latents go on learning


# ---- invariant 5: progress is a pure function of the step ----


@pytest.mark.parametrize("mask", ["feature", "element"])
@pytest.mark.parametrize("regime", ["zero", "ste"])
def test_a_resumed_run_equals_an_uninterrupted_one(regime: str, mask: str) -> None:
    """Interrupted before, in, and after windows: state dicts alone carry the run over."""

    def begin() -> tuple[ConvNet, Progression, torch.optim.Optimizer]:
        model = conv_net(frozen_gradient=regime, activation_mask=mask, within_stage="forward")
        return model, *driven(model)

    def driven(model: ConvNet) -> tuple[Progression, torch.optim.Optimizer]:
        progression, optimizer = Progression(model, TOTAL), torch.optim.AdamW(model.parameters(), lr=0.01)
        progression.attach(optimizer)
        return progression, optimizer

    whole, progression, optimizer = begin()
    train(whole, progression, optimizer, 0, TOTAL)
    part, progression, optimizer = begin()
    for first, last in ((0, 1), (1, 4), (4, 13), (13, TOTAL)):
        train(part, progression, optimizer, first, last)
        saved, inertia = copy.deepcopy(part.state_dict()), copy.deepcopy(optimizer.state_dict())
        masks = [copy.deepcopy((m.weight_mask, m.activation_mask)) for m in binary_layers(part).values()]
        part, progression, optimizer = begin()
        part.load_state_dict(saved)
        progression, optimizer = driven(part)
        optimizer.load_state_dict(inertia)
        assert progression.current_step == last
        progression.step(last)
        for layer, wanted in zip(binary_layers(part).values(), masks, strict=True):
            for actual, before in zip((layer.weight_mask, layer.activation_mask), wanted, strict=True):
                assert actual is before is None or torch.equal(actual, before)
    assert same_tensors(part.state_dict(), whole.state_dict()) == []
    assert all(layer.stage_state == "frozen" for layer in binary_layers(part).values())


# ---- invariant 6: the mask tracks the schedule, weights and activations separately ----


@pytest.mark.parametrize(("mask", "size"), [("feature", 8), ("element", 8)])
def test_masks_track_the_schedule(mask: str, size: int) -> None:
    """At every step the frozen share is p(t) within 5 standard deviations; at most 1/r of the entries thaw a step."""
    width, window, rate = 64, 20, 5
    model = conv_net(width, size, activation_mask=mask, refresh_rate=rate, schedule="linear")
    progression, before, thawed = Progression(model, STAGES * window), {}, 0
    # the third convolution has a stride of 2: the fourth one sees half the height and width
    samples = {name: (width,) if mask == "feature" else (width, *[size >> (name == NAMES[3])] * 2) for name in NAMES}
    for step in range(STAGES * window + 1):
        progression.step(step)
        for stage, (name, layer) in enumerate(binary_layers(model).items()):
            t = (step - stage * window) / window
            if not 0 <= t < 1:
                assert layer.weight_mask is None is layer.activation_mask
                assert layer.stage_state == ("pending" if t < 0 else "frozen")
                continue
            p = frozen_fraction("linear", t)
            assert layer.weight_mask.shape == layer.weight.shape and layer.activation_mask.shape == samples[name]
            for kind in ("weight_mask", "activation_mask"):
                now = getattr(layer, kind)
                assert now.dtype == torch.bool
                deviation = math.sqrt(p * (1 - p) / now.numel())
                assert abs(now.float().mean().item() - p) <= 5 * deviation + 1 / 65536
                if t > 0:
                    lost = before[name, kind] & ~now
                    assert lost.sum() <= math.ceil(now.numel() / rate)
                    thawed += int(lost.sum())
                before[name, kind] = now.clone()
            draws = layer.activation_mask.reshape(-1)
            others = layer.weight_mask.reshape(-1)[: len(draws)]
            assert t < 0.2 or t > 0.8 or len(others) < len(draws) or not torch.equal(draws, others)
    assert thawed > 0


# ---- invariant 7: evaluation is deterministic ----


@pytest.mark.parametrize("mask", ["feature", "element"])
def test_no_forward_draws_a_random_number(mask: str) -> None:
    model = conv_net(activation_mask=mask)
    progression, optimizer = Progression(model, TOTAL), torch.optim.SGD(model.parameters(), 0.01)
    for step in range(0, TOTAL + 1, 3):
        train(model, progression, optimizer, max(0, step - 3), step)
        before = random_states()
        outputs = [model.eval()(images(1)) for _ in range(2)]
        model.train()(images(1)).sum().backward()
        assert torch.equal(*outputs) and random_states() == before
        optimizer.zero_grad()


# ---- activation_mask="element" ----


def test_element_masks_need_the_size() -> None:
    model = conv_net(activation_mask="element")
    progression = Progression(model, TOTAL)
    progression.step(0)
    model.train()(images(0))
    model(images(0, size=12))  # nothing is frozen: any size will do
    progression.step(2)
    model(images(0, count=2))  # any batch
    with pytest.raises(
        ShapeError, match=r"masks for inputs of shape \(8, 8, 8\) a sample, and this one has \(8, 6, 6\)"
    ):
        model(images(0, size=6))
    message = "activation_mask='element' needs the sizes .*example_inputs"
    with pytest.raises(ConfigError, match=message):
        binarize_model(ConvNet(8, False), StoMPPConfig(activation_mask="element"))
    binarize_model(ConvNet(8, False), StoMPPConfig(activation_mask="element", binarize="weights"))
    with pytest.raises(ConfigError, match="conv_padding='one' has no mask around it"):
        StoMPPConfig(activation_mask="element", conv_padding="one")


def test_element_masks_freeze_single_elements() -> None:
    """An input moves the output, or not, by the mask of its very place: STE-free, frozen elements pass nothing."""
    model = conv_net(activation_mask="element", frozen_gradient="zero", schedule="linear")
    progression, optimizer = Progression(model, TOTAL), torch.optim.SGD(model.parameters(), 0.0)
    train(model, progression, optimizer, 0, 3)
    layer = model.blocks[0][1]
    assert isinstance(layer, BinaryConv2d) and 0.3 < layer.activation_mask.float().mean() < 0.7
    x = images(0).new_zeros(2, 8, 8, 8).uniform_(-0.1, 0.1).requires_grad_()
    layer(x).sum().backward()
    assert torch.equal(x.grad == 0, layer.activation_mask.bool().expand(2, -1, -1, -1))


# ---- the blockade: gradient_flow, blocked_upstream, blocked_unfrozen ----


def backward_passes(order: str, **options: Any) -> Iterator[tuple[int, ConvNet, list[float]]]:
    """After the backward pass of each step: its stage, the net, and the layers' blocked shares in execution order."""
    model = conv_net(order=order, **{"frozen_gradient": "zero", "schedule": "linear", **options})
    progression = Progression(model, TOTAL)
    for step in range(TOTAL):
        progression.step(step)
        model.zero_grad()
        loss_of(model, step).backward()
        flow, layers = gradient_flow(model), binary_layers(model)
        assert list(flow) == NAMES  # in the order of execution, in whatever order they freeze
        for name, found in flow.items():
            grad = layers[name].weight.grad
            values = [0.0] if grad is None else grad.reshape(-1).tolist()
            assert found.norm == pytest.approx(math.hypot(*values), rel=1e-5)
            assert found.blocked == pytest.approx(values.count(0.0) / len(values))
        yield step // WINDOW, model, [found.blocked for found in flow.values()]


def states(model: ConvNet) -> list[str]:
    return [binary_layers(model)[name].stage_state for name in NAMES]


def reaches_the_stem(model: ConvNet) -> bool:
    return model.stem.weight.grad is not None and bool(model.stem.weight.grad.any())


def test_forward_order_blocks_only_what_is_frozen() -> None:
    for stage, model, blocked in backward_passes("forward"):
        later = STAGES - 1 - stage
        assert states(model) == ["frozen"] * stage + ["transition"] + ["pending"] * later
        mask = binary_layers(model)[NAMES[stage]].weight_mask
        assert blocked == pytest.approx([1.0] * stage + [mask.float().mean().item()] + [0.0] * later)
        assert blocked_upstream(model) == (1.0 if stage else 0.0) and blocked_unfrozen(model) == 0.0
        assert reaches_the_stem(model) == (stage == 0)


def test_reverse_order_cuts_off_what_has_still_to_learn() -> None:
    for stage, model, blocked in backward_passes("reverse"):
        assert states(model) == ["pending"] * (STAGES - 1 - stage) + ["transition"] + ["frozen"] * stage
        if stage:  # the last layer is frozen: nothing gets through to any other
            assert blocked == [1.0] * STAGES and blocked_unfrozen(model) == 1.0 and not reaches_the_stem(model)
            assert blocked_upstream(model) == (0.0 if stage == STAGES - 1 else 1.0)  # the first one has no upstream
            continue
        # The channels that are frozen in the last layer's input block those channels of the layer in front of it.
        last = binary_layers(model)[NAMES[3]]
        assert blocked[2:] == pytest.approx(
            [last.activation_mask.float().mean().item(), last.weight_mask.float().mean().item()]
        )
        sizes = [binary_layers(model)[name].weight.numel() for name in NAMES]
        above = [share * size for share, size in zip(blocked, sizes, strict=True)][:3]
        assert blocked_upstream(model) == pytest.approx(sum(above) / sum(sizes[:3]))
        free = (1 - last.weight_mask.float().mean().item()) * sizes[3]
        assert blocked_unfrozen(model) == pytest.approx(sum(above) / (sum(sizes[:3]) + free))


@pytest.mark.parametrize(
    "options",
    [{"frozen_gradient": "ste"}, {"binarize": "weights"}, {"shortcuts": True}],
    ids=["surrogate", "real-activations", "shortcuts"],
)
def test_what_lifts_the_blockade(options: dict[str, Any]) -> None:
    """In reverse order too, whatever is not frozen gets a gradient, down to the first layer."""
    for _, model, blocked in backward_passes("reverse", **options):
        assert blocked_upstream(model) == blocked_unfrozen(model) == 0.0 and reaches_the_stem(model)
        if "frozen_gradient" in options:
            assert blocked == [0.0] * STAGES

"""Starting values of activations: from which inputs, when, in which order; and the model as if it were fully binary."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from models import CASES, logits, quick, same_tensors, train as train_case
from stack import WIDTH, Stack, batch, random_states, stack, train, update
from torch import Tensor, nn

from stompp_hf import Progression, StoMPPConfig, binarize_model, calibrate
from stompp_hf.errors import NotCalibratedError
from stompp_hf.modules import BinaryConv1d
from stompp_hf.modules.calibration import Observer
from stompp_hf.surgery.members import binary_layers

VANILLA = {"start": 0.0, "end": 0.0}


@contextlib.contextmanager
def inputs_seen(model: Stack) -> Iterator[list[list[Tensor]]]:
    """What enters each layer inside the block, by calls."""
    seen: list[list[Tensor]] = [[] for _ in model.layers]
    handles = [
        layer.register_forward_pre_hook(lambda _, args, place=place: seen[place].append(args[0].detach().clone()))
        for place, layer in enumerate(model.layers)
    ]
    yield seen
    for handle in handles:
        handle.remove()


def assert_values(layer: nn.Module, rows: Tensor) -> None:
    """The starting values that METHOD.md names for a two-sided input: a = mean |x|, b = 0, half the range as margin."""
    low, high = rows.min(), rows.max()
    torch.testing.assert_close(layer.activation_scale.detach(), rows.abs().mean().reshape(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(layer.activation_low, (low - (high - low) / 2).reshape(1))
    torch.testing.assert_close(layer.activation_high, (high + (high - low) / 2).reshape(1))
    assert not layer.activation_threshold.detach().any() and layer.activation_ready


def values(model: nn.Module) -> dict[str, Tensor]:
    """All calibrated values of a model."""
    return {name: value for name, value in model.state_dict().items() if "activation_" in name}


# ---- when, and in which order ----


def test_each_stage_looks_at_the_first_step_of_its_window():
    model = stack(3)
    progression = Progression(model, 12)
    for step in range(12):
        progression.step(step)
        assert [layer.activation_ready for layer in model.layers] == [step > 4 * place for place in range(3)]
        with inputs_seen(model) as seen:
            model(batch(step))
        if step % 4 == 0:
            progression.step(step + 1)
            assert_values(model.layers[step // 4], seen[step // 4][0])


def test_empty_windows_look_at_the_step_before():
    model = stack(3, start=0.5, end=0.5)
    progression = Progression(model, 10)
    train(model, progression, 0, 4)
    assert {layer.stage_state for layer in model.layers} == {"pending"}
    with inputs_seen(model) as seen:
        model(batch(4))  # the last step with nothing frozen
    progression.step(5)
    assert {layer.stage_state for layer in model.layers} == {"frozen"}
    for layer, (rows,) in zip(model.layers, seen, strict=True):
        assert_values(layer, rows)
    train(model, progression, 5, 10)


def test_vanilla_ste_is_set_in_its_first_forward_in_forward_order():
    model = stack(3, **VANILLA)
    progression = Progression(model, 10)
    progression.step(0)
    assert {layer.stage_state for layer in model.layers} == {"frozen"}
    x = batch(0)
    output = model(x)
    for layer in model.layers:  # the same by hand: each layer's statistics come from the binary layer before it
        assert_values(layer, x)
        signs = torch.where(x >= 0, 1.0, -1.0) @ torch.where(layer.weight >= 0, 1.0, -1.0).T
        scale = layer.weight.abs().mean(1)
        x = (x + torch.tanh(signs * scale * x.abs().mean() + layer.bias)).detach()
    torch.testing.assert_close(output, x, rtol=1e-4, atol=1e-5)
    train(model, progression, 1, 10)


# ---- from which inputs ----


def test_all_calls_and_all_micro_batches_count_and_evaluation_does_not():
    model = stack(2, calls=2, order="global")
    progression = Progression(model, 10)
    progression.step(0)
    with inputs_seen(model) as seen:
        model(batch(0))
        progression.step(0)  # called twice with one number: nothing changes
        model(3 * batch(1))
    model.eval()(100 * batch(2))
    progression.step(1)
    for layer, calls in zip(model.layers, seen, strict=True):
        assert len(calls) == 4
        assert_values(layer, torch.cat(calls))
    before = values(model)
    model.train()(50 * batch(3))
    progression.step(2)
    assert not same_tensors(before, values(model))  # never again


@pytest.mark.parametrize("known", [True, False])
def test_padded_positions_are_left_out_where_a_mask_is_known(known):
    model = stack(1, order="global")
    progression = Progression(model, 10)
    progression.step(0)
    x = batch(0, rows=24).reshape(4, 6, WIDTH)
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[1, 3:] = mask[2, 1:] = 0
    x[mask == 0] = 1000.0
    model(x, **({"attention_mask": mask} if known else {}))
    progression.step(1)
    assert_values(model.layers[0], x[mask == 1] if known else x.reshape(-1, WIDTH))


@pytest.mark.parametrize("options", [{}, VANILLA], ids=["window", "vanilla"])
def test_recomputation_is_not_seen(options):
    trained = []
    for recompute_first in (False, True):
        model = stack(2, calls=2, recompute_first=recompute_first, **options)
        progression = Progression(model, 6)
        losses = train(model, progression, 0, 6)
        trained.append((losses, model.state_dict()))
    assert trained[0][0] == trained[1][0]
    assert not same_tensors(trained[0][1], trained[1][1])


def test_activation_checkpointing_of_transformers_changes_nothing():
    case, weights = CASES["bert"], []
    for checkpointing in (False, True):
        model = binarize_model(case.build(), quick())
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        train_case(model, case, 0, 8, 8)
        weights.append(model.state_dict())
    assert not same_tensors(*weights)


# ---- calibrate() ----


def test_committed_but_uncalibrated_model_names_calibrate_which_then_works():
    model = stack(3)
    Progression(model, 10).step(10)
    model.eval()
    with pytest.raises(NotCalibratedError, match="calibrate"):
        model(batch(0))
    model.train()
    model.layers[1].eval()
    before = random_states()
    calibrate(model, [batch(0), {"x": batch(1)}, (batch(2),)])
    assert random_states() == before
    assert [layer.training for layer in model.layers] == [True, False, True]
    assert_values(model.layers[0], torch.cat([batch(seed) for seed in range(3)]))
    done = values(model)
    assert torch.isfinite(model.eval()(batch(3))).all()
    calibrate(model, [batch(9)])
    assert not same_tensors(done, values(model))  # nothing was due


def test_calibrate_leaves_pending_layers_alone_and_drops_padding():
    model = stack(2)
    Progression(model, 10).step(5)  # the first layer is frozen, the second at the start of its window
    x = batch(0, rows=12).reshape(2, 6, WIDTH)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 2:] = 0
    x[mask == 0] = 1000.0
    calibrate(model, [{"x": x, "attention_mask": mask}])
    assert_values(model.layers[0], x[mask == 1])
    pending = stack(2)
    calibrate(pending, [batch(0)])
    assert not any(layer.activation_ready for layer in pending.layers)


# ---- committed() ----


def test_committed_is_the_fully_frozen_model_and_is_undone_to_the_bit():
    case = CASES["bert"]
    model, twin = (binarize_model(case.build(), quick()) for _ in range(2))
    for one in (model, twin):
        train_case(one, case, 0, 3, 12)
    progression = Progression(model, 12)
    progression.step(3)
    Progression(twin, 12).step(12)
    calibrate(twin, [case.batch(50)])
    layers = binary_layers(model).values()
    flags = ("stage_state", "frozen_share", "weight_mask_bits", "activation_mask", "observer", "weight_ready")
    flags += ("activation_ready", "activation_offset", "step", "total_steps", "training")

    def everything() -> tuple[Tensor, dict[str, Tensor], list[list[object]], list[object]]:
        rng = random_states()
        tensors = {name: value.clone() for name, value in model.state_dict().items()}
        return logits(model, case.batch(60)), tensors, [[getattr(n, flag) for flag in flags] for n in layers], rng

    def assert_same(now: tuple, then: tuple) -> None:
        assert torch.equal(now[0], then[0]) and not same_tensors(now[1], then[1]) and now[3] == then[3]
        for one, other in zip(now[2], then[2], strict=True):
            assert all(a is b or (not isinstance(a, Tensor) and a == b) for a, b in zip(one, other, strict=True))

    before = everything()
    assert {layer.stage_state for layer in layers} == {"transition", "pending"}
    with progression.committed([case.batch(50)]):
        assert {layer.stage_state for layer in layers} == {"frozen"}
        inside = logits(model, case.batch(60))
        assert torch.equal(inside, logits(twin, case.batch(60))) and not torch.equal(inside, before[0])
    assert_same(everything(), before)
    with pytest.raises(RuntimeError, match="out of memory"), progression.committed(iter([case.batch(50)])):
        raise RuntimeError("out of memory")
    assert_same(everything(), before)


def test_committed_keeps_what_is_being_observed():
    model, plain = stack(2), stack(2)
    for one in (model, plain):
        progression = Progression(one, 8)
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        progression.step(0)
        update(one, optimizer, 0)
        if one is model:
            with progression.committed([batch(7)]):
                model(batch(8))
        progression.step(1)
    assert not same_tensors(model.state_dict(), plain.state_dict())


def test_committed_re_estimates_batch_norm_and_puts_it_back():
    model = nn.Sequential(Stack(2, WIDTH, 1, False), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 2))
    binarize_model(model, StoMPPConfig(), batch(0))
    progression = Progression(model, 10)
    progression.step(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with progression.committed([batch(0)]):
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
        model.eval()(batch(1))
    assert not same_tensors(before, model.state_dict())


def test_committed_without_batches_raises_and_undoes():
    model = stack(2)
    progression = Progression(model, 10)
    with pytest.raises(NotCalibratedError), progression.committed([]):
        model(batch(0))
    assert {layer.stage_state for layer in model.layers} == {"pending"}
    assert torch.isfinite(model(batch(0))).all()


def test_padding_mask_of_a_one_dimensional_convolution() -> None:
    """Positions, and not channels, are compared with the mask, even where there are as many of both."""
    layer = BinaryConv1d.convert(nn.Conv1d(4, 4, 1, bias=False), StoMPPConfig(weight_scale="tensor"))
    x, mask = torch.ones(2, 4, 4), torch.ones(2, 4)
    x[0, :, 2:], mask[0, 2:] = 9.0, 0.0
    layer.observer = Observer()
    layer.observer.watch.masks = [mask]
    layer(x)
    assert layer.observer.rows[0].shape == (6, 4) and layer.observer.rows[0].max() == 1.0

"""Progression: windows, states and masks as pure functions of the step (invariants 5 to 7), the total, the metrics."""

import io
import logging
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings, strategies as st
from stack import WIDTH, batch, random_states, stack, train

from stompp_hf import BinaryLayer, Progression
from stompp_hf.errors import CheckpointError, ConfigError, NonFiniteError, NotBinarizedError
from stompp_hf.method.masks import SoftRefreshMask
from stompp_hf.training import metrics as metrics_module
from stompp_hf.training.metrics import FlipRatio, frozen_fraction

# ---- states ----


@given(st.data(), st.integers(1, 4), st.integers(1, 300), st.lists(st.floats(0, 1), min_size=2, max_size=2))
@settings(max_examples=60, deadline=None)
def test_state_is_what_the_definition_says(data, depth, total, edges):
    count = data.draw(st.integers(1, depth), label="stages")
    order = data.draw(st.sampled_from(["forward", "reverse"]), label="order")
    within = data.draw(st.sampled_from(["together", "forward"]), label="within_stage")
    (start, end), exact = sorted(edges), [Fraction(edge) for edge in sorted(edges)]
    model = stack(depth, 2, start=start, end=end, stages=count, order=order, within_stage=within)
    progression = Progression(model, total)
    seen = [progression.state(step) for step in range(total + 2)]

    names = [f"layers.{i}" for i in range(depth)][:: 1 if order == "forward" else -1]
    stages = [[name for i, name in enumerate(names) if i * count // depth == stage] for stage in range(count)]
    for stage, members in enumerate(stages):
        for place, name in enumerate(members):
            parts, part = (len(members), place) if within == "forward" else (1, 0)
            states = [state for state, _ in (at[name] for at in seen)]
            begin, stop = states.index("frozen") - states.count("transition"), states.index("frozen")
            expected = ["pending"] * begin + ["transition"] * (stop - begin)
            assert states == expected + ["frozen"] * (total + 2 - stop)
            for edge, share in ((begin, Fraction(part, parts)), (stop, Fraction(part + 1, parts))):
                wanted = total * (exact[0] + (exact[1] - exact[0]) * (stage + share) / count)
                assert abs(edge - wanted) <= Fraction(1, 2) + Fraction(1, 10**9)  # the nearest whole step
            for step in range(begin, stop):
                assert seen[step][name][1] == pytest.approx(((step - begin) / (stop - begin)) ** 3)
            assert {at[name][1] for at in seen[:begin]} <= {0.0} and {at[name][1] for at in seen[stop:]} == {1.0}
    assert all(value == ("frozen", 1.0) for value in seen[total].values())
    assert [progression.state(step) for step in range(total + 2)] == seen  # asking changes nothing
    assert all(layer.stage_state == "pending" for layer in model.layers)


def test_stage_edges_meet_and_names_are_reported():
    progression = Progression(stack(4, 4, stages=2, start=0.1, end=0.9, refresh_rate=2), 20)
    assert [(w.begin, w.end) for w in progression.windows.values()] == [(2, 10), (2, 10), (10, 18), (10, 18)]
    assert progression.stage_in_transition(0) == (1, "part 1 of 2", 0.0)
    assert progression.stage_in_transition(6) == (1, "part 1 of 2", 0.125)
    assert progression.stage_in_transition(10) == (2, "part 2 of 2", 0.0)
    assert progression.stage_in_transition(20) == (2, "part 2 of 2", 1.0)
    assert progression.unfinished_stages(9) == ["part 1 of 2", "part 2 of 2"]
    assert progression.unfinished_stages(10) == progression.unfinished_stages(17) == ["part 2 of 2"]
    assert progression.unfinished_stages(18) == []
    assert [progression.is_complete(step) for step in (0, 17, 18, 20)] == [False, False, True, True]
    progression.step(12)
    assert progression.unfinished_stages() == ["part 2 of 2"] and progression.stage_in_transition()[0] == 2


@pytest.mark.parametrize("total", [1, 2, 3, 5])
@pytest.mark.parametrize("regime", ["zero", "ste"])
def test_empty_windows_can_be_trained_through(total, regime):
    model = stack(4, frozen_gradient=regime)
    progression = Progression(model, total)
    assert any(window.begin == window.end for window in progression.windows.values()) == (total < 4)
    assert all(math.isfinite(loss) for loss in train(model, progression, 0, total))
    for layer in model.layers:
        assert layer.stage_state == "frozen" and layer.activation_ready and layer.weight_ready
        assert torch.equal(layer.binary_weight().abs(), layer.weight_scale.detach()[:, None].expand(WIDTH, WIDTH))
    assert torch.isfinite(model.eval()(batch(0))).all()


def test_nothing_binarized_is_never_frozen():
    model = stack(2, 4, binarize="nothing")
    progression = Progression(model, 10)
    progression.step(10)
    assert {layer.stage_state for layer in model.layers} == {"pending"}
    assert progression.is_complete() and progression.unfinished_stages() == []


# ---- masks ----


@pytest.mark.parametrize("schedule", ["cubic", "flipped_quadratic"])
def test_frozen_share_tracks_the_schedule(schedule):
    total = 24
    model = stack(2, schedule=schedule)
    progression = Progression(model, total)
    for step in range(total + 1):
        progression.step(step)
        for name, layer in zip(progression.layers, model.layers, strict=True):
            state, p = progression.state(step)[name]
            assert (layer.stage_state, layer.frozen_share) == (state, p)
            if state != "transition":
                assert layer.weight_mask is None and layer.activation_mask is None
                continue
            assert layer.weight_mask.shape == (WIDTH, WIDTH) and layer.activation_mask.shape == (WIDTH,)
            for mask in (layer.weight_mask, layer.activation_mask):
                assert mask.dtype == torch.bool
                sigma = math.sqrt(p * (1 - p) / mask.numel())
                assert abs(mask.float().mean().item() - p) <= 5 * sigma + 2**-16
            assert p > 0 or layer.weight_mask.sum() == layer.activation_mask.sum() == 0
    assert [layer.frozen_share for layer in model.layers] == [1.0, 1.0]


def test_one_in_r_is_redrawn_each_step():
    entries, rate = 60_000, 50
    mask = SoftRefreshMask(entries, 0, "weight", rate)
    before, first, redrawn = mask.draws(7).clone(), mask.draws(7).clone(), []
    for step in range(8, 8 + rate):
        now = mask.draws(step).clone()
        redrawn.append((now != before).sum().item() / entries)
        assert abs(redrawn[-1] - 1 / rate) < 5 * math.sqrt(2**-16 / entries) + 1 / entries
        before = now
    assert (before != first).float().mean() > 0.999  # all of them after r steps


def test_entries_thaw_and_layers_and_tensors_have_draws_of_their_own():
    model = stack(2, order="global", schedule="linear")
    progression = Progression(model, 40)
    progression.step(20)
    one, other = (layer.weight_mask.clone() for layer in model.layers)
    progression.step(22)
    assert 0.3 < (one == other).float().mean() < 0.7
    assert ((one == 1) & (model.layers[0].weight_mask == 0)).any()


@pytest.mark.parametrize("step", [0, 3, 11, 12, 17, 24])
def test_jumping_to_a_step_equals_walking_there(step):
    walked, jumped, back = stack(2), stack(2), stack(2)
    walking, returning = Progression(walked, 24), Progression(back, 24)
    for s in range(step + 1):
        walking.step(s)
    Progression(jumped, 24).step(step)
    returning.step(24)
    returning.step(step)
    assert masks(walked) == masks(jumped) == masks(back)
    walking.step(step)  # a second call with one number changes nothing
    assert masks(walked) == masks(jumped)


def test_another_seed_draws_other_masks():
    one, other = stack(1), stack(1, mask_seed=1)
    for model in (one, other):
        Progression(model, 10).step(8)
    assert masks(one) != masks(other)


def test_no_random_draw_in_step_or_forward():
    model = stack(2)
    progression = Progression(model, 12)
    before = random_states()
    for step in range(13):
        progression.step(step)
        model.train()(batch(step)).sum().backward()
        model.eval()(batch(step))
    assert random_states() == before


# ---- the total ----


def test_total_is_kept_with_a_warning_unless_rescaled(caplog):
    model = stack(2)
    Progression(model, 40).step(10)
    with caplog.at_level(logging.WARNING):
        kept = Progression(model, 80)
    assert kept.total_steps == 40 and kept.current_step == 10
    assert "40 steps" in caplog.text and "80" in caplog.text and "rescale=True" in caplog.text
    caplog.clear()
    rescaled = Progression(model, 80, rescale=True)
    assert rescaled.total_steps == 80 and {layer.total_steps for layer in model.layers} == {40}  # not before a step
    rescaled.step(10)
    assert {layer.total_steps for layer in model.layers} == {80}
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_rescaling_never_thaws_a_stage():
    model = stack(2)
    Progression(model, 40).step(25)  # layers.0 froze at 20
    with pytest.raises(CheckpointError, match=r"layers\.0 would thaw"):
        Progression(model, 80, rescale=True)
    assert Progression(model, 50, rescale=True).total_steps == 50  # it would have frozen at 25 there too
    assert Progression(model, 30, rescale=True).total_steps == 30


@pytest.mark.parametrize("total", [0, -1, 1.5, True, None])
def test_total_must_be_a_positive_number_of_steps(total):
    with pytest.raises(ConfigError, match="total_steps"):
        Progression(stack(1), total)


def test_plain_model_is_refused():
    with pytest.raises(NotBinarizedError, match="binarize_model"):
        Progression(torch.nn.Linear(2, 2), 10)


@pytest.mark.parametrize(("rate", "warns"), [(5, False), (6, True)])
def test_windows_under_twice_the_refresh_rate_are_told(rate, warns, caplog):
    with caplog.at_level(logging.WARNING):
        Progression(stack(2, 4, refresh_rate=rate), 20)
    assert ("refresh" in caplog.text) == warns


def test_refresh_rate_follows_the_window():
    """Unset: a fifth of the window, from 1 to the paper's 100; a number that was asked for stays."""
    found = {}
    for total in (2, 40, 1000, 100_000):
        model = stack(2, end=1.0, refresh_rate=None)
        progression = Progression(model, total)
        progression.step(1)
        layer = next(iter(progression.layers.values()))
        found[total] = layer._draws["weight_mask"].refresh_rate if layer._draws else None
        assert layer.place.refresh(total) == (found[total] or 1)
    assert found == {2: None, 40: 4, 1000: 100, 100_000: 100}
    model = stack(2, end=1.0, refresh_rate=7)
    assert {layer.place.refresh(1000) for layer in Progression(model, 1000).layers.values()} == {7}


def test_a_stretched_run_redraws_at_its_own_rate():
    model = stack(1, end=1.0, refresh_rate=None)
    Progression(model, 20).step(5)
    stretched = Progression(model, 40, rescale=True)
    stretched.step(5)
    fresh = stack(1, end=1.0, refresh_rate=None)
    Progression(fresh, 40).step(5)
    assert torch.equal(model.layers[0].weight_mask, fresh.layers[0].weight_mask)


@pytest.mark.parametrize("frozen_gradient", ["ste", "zero"])
def test_a_model_in_training_can_be_saved_whole(frozen_gradient):
    model = stack(3, frozen_gradient=frozen_gradient, check_every=1)
    optimizer = torch.optim.AdamW(model.parameters())
    progression = Progression(model, 6)
    progression.attach(optimizer)
    for step in range(6):
        progression.step(step)  # with its hooks on model and layers
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
        assert torch.equal(twin.eval()(batch(step)), model.eval()(batch(step)))
        twin.train()(math.nan * batch(step))  # is no business of the one that trains
        model.train()(batch(step)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    progression.step(6)
    assert progression.is_complete()


# ---- what sign() hides ----


def test_non_finite_latents_are_found():
    model = stack(3)
    progression = Progression(model, 12)
    progression.step(11)
    progression.check_latents()
    for value in (math.nan, math.inf):
        with torch.no_grad():
            model.layers[1].weight[2, 3] = value
        with pytest.raises(NonFiniteError, match=r"layers\.1"):
            progression.check_latents()


@pytest.mark.parametrize("every", [1, 4])
def test_non_finite_activations_are_found_within_check_every_steps(every):
    model = stack(2, frozen_gradient="zero", check_every=every)
    progression = Progression(model, 24)
    with pytest.raises(NonFiniteError, match=r"layers\.0"):
        for step in range(24):
            progression.step(step)
            x = batch(step)
            x[0, 0] = math.nan if step >= 9 else 0.0
            model(x)
    assert 9 < step <= 9 + every


def test_a_step_that_was_refused_is_refused_again():
    model = stack(3, check_every=1)
    progression = Progression(model, 6)
    progression.step(0)
    model(batch(0))
    progression.step(1)
    for _ in range(3):
        model(math.nan * batch(1))
        with pytest.raises(NonFiniteError, match="input of"):
            progression.step(2)
    model(batch(1))
    progression.step(2)


def test_nothing_looks_behind_the_last_stage():
    model = stack(3)
    progression = Progression(model, 6)
    progression.step(0)
    assert model._forward_hooks
    progression.stop_after(0)
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert progression.outcome == "0 of 3 stages binary"


# ---- metrics ----


def test_frozen_fraction_equals_a_slow_count():
    model = stack(3)
    progression = Progression(model, 30)
    for step in range(0, 31, 3):
        progression.step(step)
        frozen = 0
        for layer in model.layers:
            whole = layer.weight.numel() if layer.stage_state == "frozen" else 0
            frozen += whole if layer.weight_mask is None else int(layer.weight_mask.sum())
        entries = 3 * WIDTH * WIDTH
        assert frozen_fraction(model) == pytest.approx(frozen / entries, abs=5 * math.sqrt(0.25 / entries))
    assert frozen_fraction(model) == 1.0


@pytest.mark.parametrize("sample", [1_000_000, 1000])
def test_flip_ratio_equals_a_slow_count(sample, monkeypatch):
    monkeypatch.setattr(metrics_module, "SAMPLE", sample)
    model = stack(3)
    progression = Progression(model, 30)
    progression.step(0)
    meter = FlipRatio(model)
    generator = torch.Generator().manual_seed(0)
    stride = -(-WIDTH * WIDTH // sample)
    for step in (0, 5, 15, 30):  # one, one, two and three layers are not pending
        progression.step(step)
        flipped = looked_at = 0
        for layer in model.layers:
            old = layer.weight.detach().flatten().tolist()
            flip = torch.rand(layer.weight.shape, generator=generator) < 0.1
            with torch.no_grad():
                layer.weight[flip] *= -1
                layer.weight[:, :2] = 0.0  # sign(0) is +1
            if layer.stage_state != "pending":
                pairs = list(zip(old, layer.weight.detach().flatten().tolist(), strict=True))[::stride]
                looked_at += len(pairs)
                flipped += sum((a >= 0) != (b >= 0) for a, b in pairs)
        assert meter.update() == flipped / looked_at > 0
        assert meter.update() == 0.0


def test_flip_ratio_is_zero_while_nothing_freezes():
    model = stack(1, start=0.5)
    Progression(model, 10).step(2)
    meter = FlipRatio(model)
    with torch.no_grad():
        model.layers[0].weight.neg_()
    assert meter.update() == 0.0


def masks(model: torch.nn.Module) -> list[object]:
    """State and masks of every binary layer, in a form that == compares."""
    layers = [layer for layer in model.modules() if isinstance(layer, BinaryLayer)]
    parts = [(layer.weight_mask, layer.activation_mask) for layer in layers]
    values = [[None if mask is None else mask.tolist() for mask in pair] for pair in parts]
    return [(layer.stage_state, layer.frozen_share, value) for layer, value in zip(layers, values, strict=True)]

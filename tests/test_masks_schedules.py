"""Schedules, windows, and the soft-refresh mask: how many entries are frozen, which, and how long."""

import itertools
import math
import pickle

import pytest
import reference
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from stompp_hf import StoMPPConfig
from stompp_hf.errors import ConfigError
from stompp_hf.method.masks import SoftRefreshMask
from stompp_hf.method.schedules import SCHEDULES, frozen_fraction
from stompp_hf.method.windows import Window
from stompp_hf.surgery.plan import Entry, Plan

NAMES = ("cubic", "cosine", "linear", "quadratic", "flipped_quadratic")
quick = settings(max_examples=50, deadline=None, derandomize=True, database=None)


# ---- schedules ----


def test_the_papers_schedules_are_there() -> None:
    assert set(SCHEDULES) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_schedule(name: str) -> None:
    times = [i / 1000 for i in range(1001)]
    fractions = [frozen_fraction(name, t) for t in times]
    assert fractions[0] == 0.0 and fractions[-1] == 1.0
    assert all(a < b for a, b in itertools.pairwise(fractions))
    assert fractions == pytest.approx([reference.frozen_fraction(name, t) for t in times], rel=1e-12, abs=1e-15)
    assert frozen_fraction(name, -0.5) == 0.0 and frozen_fraction(name, 1.5) == 1.0


def test_schedules_at_one_half() -> None:
    halves = {"cubic": 0.125, "quadratic": 0.25, "linear": 0.5, "flipped_quadratic": 0.75, "cosine": 0.5}
    assert {name: frozen_fraction(name, 0.5) for name in NAMES} == pytest.approx(halves)
    assert frozen_fraction("cosine", 0.25) < 0.25


def test_unknown_schedule_names_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"'cubik'.*cubic.*linear"):
        frozen_fraction("cubik", 0.5)


# ---- windows ----


@quick
@given(
    edges=st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)).map(sorted),
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=8),
    total=st.integers(1, 5000),
    within=st.sampled_from(["together", "forward"]),
)
def test_windows_equal_reference(edges: list[float], sizes: list[int], total: int, within: str) -> None:
    """Each window is the reference's, rounded to steps; windows follow one another without gap or overlap."""
    start, end = edges
    entries = [Entry(f"{k}.{i}", k, str(k)) for k, size in enumerate(sizes) for i in range(size)]
    result = Plan(StoMPPConfig(start=start, end=end, within_stage=within), entries).windows(total)
    for k, size in enumerate(sizes):
        begin, stop = reference.window(start, end, k, len(sizes))
        for i in range(size):
            window = result[f"{k}.{i}"]
            part = reference.window(begin, stop, i, size) if within == "forward" else (begin, stop)
            assert (window.begin, window.end) == pytest.approx([edge * total for edge in part], abs=0.5 + 1e-6)
    order = list(dict.fromkeys((w.begin, w.end) for w in result.values() if w.begin < w.end))
    assert all(one[1] == other[0] for one, other in itertools.pairwise(order))
    if order:
        assert (order[0][0], order[-1][1]) == (round(total * start), round(total * end))


def test_state_in_a_window() -> None:
    states = {step: Window(10, 20).state(step) for step in (0, 9, 10, 15, 19, 20, 99)}
    assert states == {
        0: ("pending", 0.0),
        9: ("pending", 0.0),
        10: ("transition", 0.0),
        15: ("transition", 0.5),
        19: ("transition", 0.9),
        20: ("frozen", 1.0),
        99: ("frozen", 1.0),
    }
    assert [Window(5, 5).state(step)[0] for step in (4, 5)] == ["pending", "frozen"]
    assert Window(0, 0).state(0) == ("frozen", 1.0)  # vanilla STE: frozen before the first step


# ---- masks ----


def mask_of(entries: int = 1000, seed: int = 0, name: str = "layer.weight_mask", rate: int = 10) -> SoftRefreshMask:
    return SoftRefreshMask(entries, seed, name, rate)


def frozen(mask: SoftRefreshMask, step: int, p: float) -> Tensor:
    return mask.fill(torch.empty(mask.numel), step, p)


def draws(mask: SoftRefreshMask, step: int) -> Tensor:
    return mask.draws(step).clone()  # the mask owns its draws, and changes them in place


@quick
@given(
    entries=st.integers(1, 300),
    rate=st.integers(1, 50),
    seed=st.integers(0, 2**40),
    name=st.text(max_size=8),
    path=st.lists(st.integers(0, 90), min_size=1, max_size=4),
)
def test_pure_function_of_the_step(entries: int, rate: int, seed: int, name: str, path: list[int]) -> None:
    """Stepping, jumping ahead and going back all arrive at the draws of a fresh mask."""
    stepping, jumping = (SoftRefreshMask(entries, seed, name, rate) for _ in range(2))
    for step in range(path[-1] + 1):
        stepping.draws(step)
    for step in path:
        jumping.draws(step)
    fresh = SoftRefreshMask(entries, seed, name, rate).draws(path[-1])
    assert torch.equal(stepping.draws(path[-1]), fresh)
    assert torch.equal(jumping.draws(path[-1]), fresh)


def test_draws_are_pinned() -> None:
    """A checkpoint resumes under later versions too, so the draws of a given seed, name and step never change."""
    assert draws(mask_of(6, seed=1, name="a", rate=3), 5).tolist() == [19839, -6398, -527, -2975, 16072, 1564]


@pytest.mark.parametrize("p", [0.0, 0.001, 0.125, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("step", [0, 7, 1234])
def test_frozen_share_tracks_p(p: float, step: int) -> None:
    entries = 40_000
    share = frozen(mask_of(entries), step, p).double().mean().item()
    assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / entries) + 2**-16
    if p in (0.0, 1.0):
        assert share == p


@pytest.mark.parametrize("rate", [1, 10, 64, 5000])
def test_ends_are_exact(rate: int) -> None:
    """Nothing is frozen at p = 0 and everything at p = 1, at every step, whatever the draws."""
    mask = mask_of(70_000, rate=rate)
    for step in (0, 3):
        assert not frozen(mask, step, 0.0).any()
        assert frozen(mask, step, 1.0).all()
    assert mask.draws(3).min() < -32_700 and mask.draws(3).max() > 32_700  # the extremes are really drawn


def test_share_tracks_the_schedule_at_every_step() -> None:
    entries, total, mask = 20_000, 60, mask_of(20_000)
    for step in range(total + 1):
        p = frozen_fraction("cubic", step / total)
        share = frozen(mask, step, p).double().mean().item()
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / entries) + 2**-16


@pytest.mark.parametrize(("entries", "rate"), [(1000, 10), (1003, 10), (7, 10), (1000, 1)])
def test_every_entry_is_redrawn_once_in_r_steps(entries: int, rate: int) -> None:
    mask = mask_of(entries, rate=rate)
    last, counts = draws(mask, 20), torch.zeros(entries)
    for step in range(21, 21 + rate):
        now = draws(mask, step)
        changed = (now != last).nonzero().flatten()
        assert abs(len(changed) - entries / rate) < 1 + 1e-9
        counts[changed] += 1
        last = now
    assert (counts == 1).all()


def test_mean_redraw_share_is_one_in_r() -> None:
    """Of the membership, too: at fixed p a redraw changes it with probability 2 p (1 - p)."""
    entries, rate, p = 50_000, 20, 0.3
    mask = mask_of(entries, rate=rate)
    last_draws, last_mask = draws(mask, 0), frozen(mask, 0, p)
    redrawn = toggled = 0
    for step in range(1, rate + 1):
        now, frozen_now = draws(mask, step), frozen(mask, step, p)
        redrawn += int((now != last_draws).sum())
        toggled += int((frozen_now != last_mask).sum())
        last_draws, last_mask = now, frozen_now
    assert redrawn / (entries * rate) == pytest.approx(1 / rate, rel=1e-3)
    expected = 2 * p * (1 - p)
    assert abs(toggled / entries - expected) < 5 * math.sqrt(expected * (1 - expected) / entries)


def test_entries_can_thaw() -> None:
    """Early commitments are not permanent, although the frozen fraction only grows."""
    mask = mask_of(5000)
    before, after = frozen(mask, 50, 0.5), frozen(mask, 60, 0.6)
    thawed = ((before == 1) & (after == 0)).double().mean().item()
    assert abs(thawed - 0.5 * 0.4) < 5 * math.sqrt(0.2 * 0.8 / 5000)


@quick
@given(step=st.integers(0, 100), fractions=st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)).map(sorted))
def test_nested_in_p_for_fixed_draws(step: int, fractions: list[float]) -> None:
    mask = mask_of(500)
    fewer, more = (frozen(mask, step, p) for p in fractions)
    assert (fewer <= more).all()
    assert set(fewer.tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("other", "step"),
    [
        (mask_of(20_000, name="layer.activation_mask"), 30),
        (mask_of(20_000, name="layer2.weight_mask"), 30),
        (mask_of(20_000, seed=1), 30),
        (mask_of(20_000), 40),
        (mask_of(20_000), 31 + 10),
    ],
    ids=["activation", "layer", "seed", "r steps later", "r + 1 steps later"],
)
def test_draws_are_independent(other: SoftRefreshMask, step: int) -> None:
    one, two = draws(mask_of(20_000), 30).double(), other.draws(step).double()
    assert abs(torch.corrcoef(torch.stack([one, two]))[0, 1]) < 5 / math.sqrt(20_000)


@pytest.mark.parametrize("lag", [1, 2, 4, 10, 100])
def test_neighbours_are_independent(lag: int) -> None:
    values = draws(mask_of(20_000), 30).double()
    assert abs(torch.corrcoef(torch.stack([values[lag:], values[:-lag]]))[0, 1]) < 5 / math.sqrt(20_000)


def test_two_bytes_an_entry() -> None:
    mask = mask_of(100_000)
    frozen(mask, 33, 0.4)
    assert mask.draws(33).dtype == torch.int16
    held = sum(v.numel() * v.element_size() for v in vars(mask).values() if isinstance(v, Tensor))
    assert held <= 2 * mask.numel
    assert len(pickle.dumps(vars(mask))) < 2 * mask.numel + 4000  # and nothing else that grows


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fill_writes_any_shape_and_dtype(dtype: torch.dtype) -> None:
    target = torch.full((4, 5, 5), 7.0, dtype=dtype)
    assert mask_of(100).fill(target, 12, 0.5) is target
    assert torch.equal(target.flatten().float(), frozen(mask_of(100), 12, 0.5))


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    frozen(mask_of(), 5, 0.5)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_mask_that_is_there_already_is_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless anything else wrote to it, or it is another tensor, step or fraction."""
    mask, made = torch.zeros(64), SoftRefreshMask(64, 0, "m", 4)
    drawn: list[int] = []
    draws = made.draws
    monkeypatch.setattr(made, "draws", lambda step: drawn.append(step) or draws(step))
    expected = made.fill(mask, 9, 0.5).clone()
    made.fill(mask, 9, 0.5)
    assert drawn == [9]
    mask[0] = 7.0
    assert torch.equal(made.fill(mask, 9, 0.5), expected)
    assert torch.equal(made.fill(torch.zeros(64), 9, 0.5), expected)
    made.fill(mask, 9, 0.6)
    made.fill(mask, 10, 0.6)
    assert drawn == [9, 9, 9, 9, 10]

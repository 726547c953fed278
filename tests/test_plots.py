"""Pictures of a real run: their numbers against what was watched from outside, and whether they can be read."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import CASES
from recorded_run import EVERY, STEPS, Watcher, run_trainer
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification

from stompp_hf import GradientNormCallback, pack_model, read_run
from stompp_hf.errors import CheckpointError, ConfigError, ExtraError, RunError
from stompp_hf.reports import run_plots as plots
from stompp_hf.reports.drawing import DPI, LINES, WIDTH, save, short_names
from stompp_hf.reports.runs import Run, run_of
from stompp_hf.reports.weight_plots import weights
from stompp_hf.surgery.members import binary_layers

BLOCKS = ["bert.encoder.layer.0", "bert.encoder.layer.1"]
GRADIENT = "stompp_grad_norm"


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Watcher, Path]:
    """A finished run: its Trainer, its watcher, its folder."""
    folder, watcher = tmp_path_factory.mktemp("runs") / "demo", Watcher()
    return run_trainer(folder, watcher), watcher, folder


def image_of(axis: Any) -> np.ma.MaskedArray:
    """The numbers that a map shows, a row a stage."""
    return np.ma.asarray(axis.collections[0].get_array()).reshape(len(BLOCKS), -1)


def texts(figure: Any) -> list[str]:
    """Everything that is written in a picture."""
    return [t.get_text() for t in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def test_frozen_fractions_are_those_of_the_layers(watched: tuple[Any, Watcher, Path]) -> None:
    _, watcher, folder = watched
    run = read_run(folder)
    assert [name for name, _ in run.stage_windows()] == BLOCKS
    found = np.array(run.frozen_fractions(sorted(watcher.shares))).T
    np.testing.assert_allclose(found, [watcher.shares[step] for step in sorted(watcher.shares)], rtol=1e-12)
    assert 0.0 < found[5, 0] < 1.0 and found[19].tolist() == [1.0, 1.0]
    assert run.edges == [2, 10, 18]


def test_gradient_norms_are_means_of_every_look(watched: tuple[Any, Watcher, Path]) -> None:
    _, watcher, folder = watched
    run = read_run(folder)
    for row, block in enumerate(BLOCKS):
        steps, norms = run.series(f"{GRADIENT}/{block}")
        assert steps == list(range(EVERY, STEPS + 1, EVERY))
        expected = [np.mean([watcher.norms[step - k][row] for k in range(1, EVERY + 1)]) for step in steps]
        np.testing.assert_allclose(norms, expected, rtol=1e-5)
    # STE-free, a block that is frozen gets nothing; the other one does until it is frozen too.
    assert run.series(f"{GRADIENT}/{BLOCKS[0]}")[1][-4:] == [0.0] * 4
    assert run.series(f"{GRADIENT}/{BLOCKS[1]}")[1][-4] > 0.0


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_gradient_norms_need_a_number_of_steps(every: Any) -> None:
    with pytest.raises(ConfigError, match="every="):
        GradientNormCallback(every)


def test_progress_shows_the_map_and_the_curves(watched: tuple[Any, Watcher, Path]) -> None:
    trainer, watcher, folder = watched
    figure = plots.progress(read_run(folder))
    accuracy, loss, frozen = figure.axes[:3]
    shown = image_of(frozen)
    assert shown.shape == (2, STEPS)
    np.testing.assert_allclose(shown.T, [watcher.shares[step] for step in range(STEPS)], rtol=1e-12)
    assert [label.get_text() for label in frozen.get_yticklabels()] == ["layer.0", "layer.1"]
    logged = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), logged)
    evaluated = {r["step"]: r["eval_accuracy"] for r in trainer.state.log_history if "eval_accuracy" in r}
    np.testing.assert_array_equal(accuracy.lines[0].get_xdata(), sorted(evaluated))
    np.testing.assert_array_equal(accuracy.lines[0].get_ydata(), [evaluated[step] for step in sorted(evaluated)])
    assert {"held-out", "training", "accuracy", "loss", "step"} <= set(texts(figure))


def test_gradient_map_masks_what_got_none(watched: tuple[Any, Watcher, Path]) -> None:
    run = read_run(watched[2])
    assert plots.stage_metrics(run) == {GRADIENT: BLOCKS}
    shown = image_of(plots.by_stage(run, GRADIENT).axes[0])
    norms = np.array([run.series(f"{GRADIENT}/{block}")[1] for block in BLOCKS])
    assert (np.ma.getmaskarray(shown) == (norms == 0.0)).all() and shown.mask.any() and not shown.mask.all()
    np.testing.assert_allclose(shown.compressed(), np.log10(norms[norms > 0.0]))
    assert plots.by_stage(run, "stompp_other") is None


def test_rows_stand_in_execution_order_whatever_freezes_first(tmp_path: Path) -> None:
    run_trainer(tmp_path, order="reverse")
    run = read_run(tmp_path)
    assert [name for name, _ in run.stage_windows()] == BLOCKS[::-1]
    frozen = plots.progress(run).axes[2]
    assert [label.get_text() for label in frozen.get_yticklabels()] == ["layer.0", "layer.1"]
    shown = image_of(frozen)
    assert shown[1, 11] == 1.0 and shown[0, 11] < 0.1
    assert plots.stage_metrics(run)[GRADIENT] == BLOCKS


def test_every_other_number_that_was_logged_is_drawn(watched: tuple[Any, Watcher, Path]) -> None:
    run = read_run(watched[2])
    before = texts(plots.metrics(run))
    assert {"flip ratio", "clipped weights", "blocked share", "grad norm behind"} <= set(before)
    for record in run.records:
        if "loss" in record:
            record |= {"stompp_clipped_share": 0.1 * record["step"], "stompp_blocked/a": 0.5, "stompp_blocked/b": 0.2}
    figure = plots.metrics(run)
    assert "clipped share" in texts(figure) and "clipped share" not in before
    assert plots.stage_metrics(run)["stompp_blocked"] == ["a", "b"]
    assert image_of(plots.by_stage(run, "stompp_blocked").axes[0])[:, 0].tolist() == [0.5, 0.2]


def test_a_live_trainer_and_a_bare_log_will_do(watched: tuple[Any, Watcher, Path]) -> None:
    trainer, _, folder = watched
    live, read = run_of(trainer), read_run(folder)
    assert live.frozen_fractions(range(STEPS)) == read.frozen_fractions(range(STEPS))
    assert live.main_metric == "eval_accuracy"
    bare = Run("bare", records=trainer.state.log_history)
    fraction = plots.progress(bare).axes[2].lines[0].get_ydata()
    assert fraction[0] < fraction[-1] == 1.0
    assert plots.progress(Run("empty")) is plots.metrics(Run("empty")) is plots.compare([Run("empty")]) is None


def test_runs_are_compared(watched: tuple[Any, Watcher, Path]) -> None:
    one, other = read_run(watched[2]), read_run(watched[2])
    other.name = "other"
    figure = plots.compare([one, other])
    assert {"demo", "other"} <= set(texts(figure))
    lines = [(line.get_linestyle(), line.get_marker()) for line in figure.axes[0].lines]
    assert len(set(lines)) == 2


def test_a_run_that_died_shows_how_far_it_got(watched: tuple[Any, Watcher, Path]) -> None:
    run = read_run(watched[2] / "checkpoint-12")
    assert (run.step, run.max_steps, run.total_steps) == (12, STEPS, STEPS)
    figure = plots.progress(run)
    assert "the run ended at step 12 of 20" in texts(figure)
    assert image_of(figure.axes[2]).shape == (2, 12) and figure.axes[2].get_xlim() == (0, STEPS)


def test_a_resumed_run_keeps_the_total_of_its_model(watched: tuple[Any, Watcher, Path], tmp_path: Path) -> None:
    """Trainer's state has the new max_steps; the windows are those of the total that the model itself keeps."""
    for path in watched[2].iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    (tmp_path / "trainer_state.json").write_text(json.dumps({**state, "max_steps": 40}))
    run = read_run(tmp_path)
    assert (run.max_steps, run.total_steps, run.edges) == (40, STEPS, [2, 10, 18])
    assert any("The progression has 20 steps" in note for note in run.notes)


# ---- weights ----


def test_weight_histograms_tell_how_many_signs_changed(watched: tuple[Any, Watcher, Path]) -> None:
    folder = watched[2]
    before, after = (load_file(path / "model.safetensors") for path in (folder / "checkpoint-6", folder))
    names = [name for name in binary_layers(watched[0].model) if name.startswith(BLOCKS[1])]
    changed = [(before[f"{n}.weight"] >= 0) != (after[f"{n}.weight"] >= 0) for n in names]
    share = float(torch.cat([c.flatten() for c in changed]).float().mean())
    figure = weights(folder / "checkpoint-6", folder)
    assert share > 0 and f"layer.1\n{share:.1%} changed sign" in texts(figure)


def test_weights_before_may_be_the_plain_model_without_its_prefix(
    watched: tuple[Any, Watcher, Path], tmp_path: Path
) -> None:
    folder = watched[2]
    CASES["bert"].build().save_pretrained(tmp_path / "plain")
    AutoModel.from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "base")
    assert texts(weights(tmp_path / "base", folder)) == texts(weights(tmp_path / "plain", folder))


def test_weights_that_cannot_be_compared_are_refused(watched: tuple[Any, Watcher, Path], tmp_path: Path) -> None:
    folder = watched[2]
    with pytest.raises(RunError, match="share no binary layer"):
        weights(tmp_path, folder)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        weights(folder, tmp_path)
    pack_model(AutoModelForSequenceClassification.from_pretrained(folder)).save_pretrained(tmp_path / "packed")
    with pytest.raises(RunError, match="is packed"):
        weights(folder, tmp_path / "packed")


# ---- can they be read ----


def test_pictures_are_legible_at_the_width_of_a_readme(watched: tuple[Any, Watcher, Path], tmp_path: Path) -> None:
    from PIL import Image

    folder = watched[2]
    run = read_run(folder)
    drawn = [plots.progress(run), plots.by_stage(run, GRADIENT), plots.metrics(run), plots.compare([run, run])]
    for index, figure in enumerate([*drawn, weights(folder / "checkpoint-6", folder)]):
        path = save(figure, tmp_path / f"{index}.png")
        with Image.open(path) as picture:
            assert picture.width == WIDTH * DPI == 800
            assert picture.convert("L").getextrema()[0] < 80  # something dark is on it
        assert path.stat().st_size < 60_000
        written = figure.findobj(lambda artist: hasattr(artist, "get_fontsize") and artist.get_text().strip())
        assert min(text.get_fontsize() for text in written) >= 9 * 0.69  # exponents of a logarithmic axis


def test_nothing_is_told_by_hue_alone(watched: tuple[Any, Watcher, Path]) -> None:
    frozen = plots.progress(read_run(watched[2])).axes[2].collections[0]
    colours = frozen.cmap(np.linspace(0, 1, 64))[:, :3]
    light = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light) < 0).all() and light[0] - light[-1] > 0.7
    assert len({(line["linestyle"], line["marker"]) for line in LINES}) == len(LINES)


def test_short_names() -> None:
    assert short_names(BLOCKS) == ["layer.0", "layer.1"]
    assert short_names(["encoder.layer.0", "decoder.layer.0"]) == ["encoder", "decoder"]
    assert short_names(["all"]) == ["all"] and short_names(["a.b", "a.b"]) == ["a.b", "a.b"]
    assert short_names(["r.s.0.c", "r.s.1.c"]) == ["s.0", "s.1"]
    assert short_names(["x", "x.y"]) == ["x", "x.y"]
    assert short_names(["a.b.query", "a.b.key"]) == ["query", "key"]


def test_without_matplotlib_the_extra_is_named(
    watched: tuple[Any, Watcher, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = read_run(watched[2])
    for draw in (plots.progress, plots.metrics, lambda run: plots.compare([run])):
        with pytest.raises(ExtraError, match=r"pip install 'stompp-hf\[plots\]'"):
            draw(run)

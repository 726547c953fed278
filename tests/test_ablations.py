"""The ablation runner on a few tiny images: resumable cells, pairs, tables, intervals and plots."""

import io
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
ABLATIONS = ROOT / "examples" / "ablations"
sys.path.insert(0, str(ABLATIONS))
import data as ablation_data  # noqa: E402
import grid  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402

pytest.importorskip("PIL")
QUICK = ["--preset", "quick"]


def write_images(path: Path, count: int, seed: int) -> None:
    """A parquet file as CIFAR-10's, with small noisy images whose brightness tells the label."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    random = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    rows = []
    for label in labels:
        pixels = random.integers(0, 64, (10, 10, 3)) + 48 * label
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    pyarrow.parquet.write_table(pyarrow.table({"img": rows, "label": labels}), path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name the images."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "train.parquet", 96, 0)
    write_images(folder / "test.parquet", 32, 1)
    return ["--train_file", str(folder / "train.parquet"), "--test_file", str(folder / "test.parquet")]


def scores(folder: Path) -> dict[str, Any]:
    """What decides whether two runs of the grid are the same."""
    records = [json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")]
    return {r["id"]: (r["accuracy"], r["training"], r["gradient_flow"], r["course"]) for r in records}


@pytest.fixture(scope="module")
def done(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick grid: killed after its first cells, and started again with two workers."""
    folder = tmp_path_factory.mktemp("run")
    words = [*QUICK, *files, "--output_dir", str(folder), "--seeds", "0", "1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ABLATIONS / "run.py"), *words]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    cells = folder / "cells"
    while not list(cells.glob("*.json")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    before = {path: path.stat().st_mtime_ns for path in cells.glob("*.json")}
    assert 1 <= len(before) < 10
    run.main([*words, "--workers", "2"])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    return folder


def test_resumed_grid_on_two_workers_equals_one_run(done: Path, files: list[str], tmp_path: Path) -> None:
    assert len(scores(done)) == 10
    run.main([*QUICK, *files, "--output_dir", str(tmp_path), "--seeds", "1", "--only", "bnn-stompp-*", "bnn-vanilla*"])
    alone = scores(tmp_path)
    assert len(alone) == 3
    assert alone == {name: value for name, value in scores(done).items() if name in alone}


def test_other_settings_are_refused(done: Path, files: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"made with other settings \(epochs 3 -> 2\)"):
        run.main([*QUICK, *files, "--output_dir", str(done), "--seeds", "0", "--epochs", "2"])


def test_table(done: Path) -> None:
    text = report.write_report(done)
    assert "| BNN, 6, lr 0.05 | vanilla STE |  | 2 |" in text
    assert "| BNN, 6, lr 0.05 | StoMPP+STE | reverse, r = 1 | 2 |" in text
    assert "forward minus reverse" in text
    assert len(json.loads((done / "results.json").read_text())) == 10


def test_methods_of_a_seed_are_pairs(done: Path) -> None:
    results = report.read(done)
    pairs = {cell.seed: set() for cell in results}
    for cell, record in results.items():
        pairs[cell.seed].add(json.dumps(record["pair"]))
        assert record["course"]["frozen_fraction"][-1] == 1.0
        assert record["binary_layers"] == 6
    assert [len(same) for same in pairs.values()] == [1, 1]
    assert pairs[0] != pairs[1]
    cell = next(cell for cell in results if cell.method == "stompp")
    results[cell]["pair"]["weights"] = "other"
    with pytest.raises(ValueError, match="are no pair"):
        report.paired(results, [cell], grid.Cell.baseline)


def test_gradient_flow_shows_what_order_does(done: Path) -> None:
    """Forward, what is not frozen always gets a gradient; reverse, a frozen activation severs what is behind it."""
    for cell, record in report.read(done).items():
        flow = record["gradient_flow"]
        assert len(flow["layer"]) == 6
        if cell.method == "stompp":
            assert (max(flow["starved"]) > 0.5) == (cell.order == "reverse")


def test_plots(done: Path) -> None:
    from plots import write_plots

    written = write_plots(done)
    assert [path.name for path in written] == ["accuracy.png", "depth.png", "ordering.png", "gradient_flow.png"]
    assert all(path.stat().st_size > 10_000 for path in written)


def test_plots_without_matplotlib_name_the_extra(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import plots

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"stompp-hf\[plots\]"):
        plots.write_plots(done)


def test_interval_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, sd 1, t at 2 degrees of freedom 4.303, so half = 4.303 / sqrt(3)."""
    found = report.interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)
    assert not found.resolved
    assert str(found) == "+2.00 [-0.48, +4.48], not resolved"
    assert report.interval([2.0, 2.1, 2.2]).resolved
    assert str(report.interval([-1.0])) == "-1.00 (one seed)"


def test_cells_have_stable_names() -> None:
    assert grid.Cell("stompp_ste").id == "bnn-stompp_ste-forward-cubic-r100-d18-s0"
    cell = grid.Cell("stompp", "bwn", 48, 2, order="reverse", stages="6", end=0.8, lr=0.05, shortcuts=False)
    assert cell.id == "bwn-stompp-reverse-cubic-r100-stages_6-from0to0.8-lr0.05-plain-d48-s2"
    assert cell.baseline().id == "bwn-vanilla_ste-lr0.05-plain-d48-s2"
    for preset in grid.PRESETS.values():
        cells = preset([0, 1, 2]).cells
        assert len({cell.id for cell in cells}) == len(cells)
        for cell in cells:
            cell.config()


def test_batches_depend_on_seed_and_step_only(files: list[str], tmp_path: Path) -> None:
    path, _ = ablation_data.cached(files[1], files[3], 8, tmp_path)
    images = ablation_data.load(path)
    assert images.train.images.shape == (96, 3, 8, 8)
    assert images.classes == 4
    batches, again = (images.batches(0, 64, 16) for _ in range(2))
    assert torch.equal(again[5][0], batches[5][0])
    assert not torch.equal(batches[5][0], batches[6][0])
    assert not torch.equal(images.batches(1, 64, 16)[5][0], batches[5][0])
    epoch = torch.cat([batches.indices(step) for step in range(4, 8)])
    assert torch.equal(epoch.sort().values, batches.subset.sort().values)


def test_plain_networks_have_no_shortcuts() -> None:
    from model import build

    recipe = grid.PRESETS["quick"]([0]).recipe
    sizes = []
    for shortcuts in (True, False):
        torch.manual_seed(0)
        model = build(grid.Cell("stompp", depth=12, shortcuts=shortcuts), recipe, 4).eval()
        for block in model.resnet.encoder.stages:
            torch.nn.init.zeros_(block.layers[1].layer[1].normalization.weight)
        sizes.append(float(model.resnet(torch.randn(2, 3, 8, 8)).last_hidden_state.detach().abs().sum()))
    assert sizes[0] > 0.0
    assert sizes[1] == 0.0

"""The report: what stands in it, that it is one file that fetches and runs nothing, and what broken input gives."""

import base64
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import CASES
from PIL import Image
from recorded_run import STEPS, run_trainer
from transformers import AutoModelForSequenceClassification

from stompp_hf import pack_model, read_run, record_run
from stompp_hf.cli import main
from stompp_hf.errors import RunError
from stompp_hf.reports.html_report import write_report
from stompp_hf.reports.runs import run_of

VOID = {"meta", "img", "br"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")


class Page(HTMLParser):
    """A page taken apart: its text, its pictures; refuses tags that do not nest, and whatever fetches or runs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[bytes] = []
        self.words: list[str] = []
        self.rows: dict[str, list[str]] = {}
        self.marked: set[str] = set()
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object", "embed"), tag
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert name not in ("href", "srcset", "action") and not name.startswith("on"), name
            if name == "src":
                kind, _, data = str(value).partition(",")
                assert kind == "data:image/png;base64"
                self.pictures.append(base64.b64decode(data, validate=True))
        if tag == "tr":
            self.cells: list[str] = []
            self.differs = ("class", "differs") in attrs
        elif tag in ("td", "th"):
            self.cells.append("")
        elif tag == "img":
            assert dict(attrs).get("alt")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag
        if tag == "tr" and self.cells[0]:
            self.rows[self.cells[0]] = self.cells[1:]
            self.marked |= {self.cells[0]} if self.differs else set()

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data

    @property
    def text(self) -> str:
        return " ".join(self.words)


def page(path: Path) -> Page:
    """The page in a file, which must forbid fetching and name no address."""
    text = path.read_text(encoding="utf-8")
    assert "default-src 'none'" in text and "url(" not in text and "@import" not in text
    return Page(text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run_trainer(folder)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to break."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def messages(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, *words: str) -> tuple[int, str]:
    """Exit status of a command, and what it said on stderr and in the log."""
    caplog.clear()
    status = main(list(words))
    return status, capsys.readouterr().err + " ".join(record.getMessage() for record in caplog.records)


# ---- what stands in it ----


def test_the_command_writes_one_file_with_everything(finished: Path, tmp_path: Path) -> None:
    out, pictures = tmp_path / "new" / "page.html", tmp_path / "pictures"
    command = [sys.executable, "-m", "stompp_hf", "report", str(finished), "--out", str(out)]
    result = subprocess.run([*command, "--pictures", str(pictures)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(out) and [path.name for path in out.parent.iterdir()] == ["page.html"]
    found, results = page(out), json.loads((finished / "all_results.json").read_text())
    assert found.rows["steps"] == ["20 of 20"] and found.rows["stages frozen"] == ["2 of 2"]
    assert found.rows["accuracy at the end"] == [f"{results['eval_accuracy']:.5g}"]
    assert found.rows["train_loss"] == [f"{results['train_loss']:.5g}"]
    assert found.rows["frozen_gradient"] == ["zero"] and found.rows["refresh_rate"] == ["2"]
    assert found.rows["command"] == ["python train.py --hub_token '***' '--api_key=***' --learning_rate 1e-3"]
    assert found.rows["torch"] and found.rows["hub_token"] == ["***"]
    assert "12 layers binary (weights_and_activations), 2 stages, training format" in found.text
    assert "real: classifier: head" in found.text and "report" in found.text.rpartition("Report:")[2]
    assert "abc123" not in out.read_text()
    names = {"progress.png", "grad_norm.png", "metrics.png", "weights.png"}
    assert {path.name for path in pictures.iterdir()} == names and len(found.pictures) == len(names)
    for picture in (*found.pictures, *(path.read_bytes() for path in pictures.iterdir())):
        Image.open(io.BytesIO(picture)).verify()


def test_several_runs_stand_side_by_side(finished: Path, copy: Path, tmp_path: Path) -> None:
    """Equal rows are not marked, different ones are; folders of one name are named with their parents."""
    twin = Path(shutil.copytree(copy, tmp_path / "other" / "finished"))
    state = json.loads((twin / "trainer_state.json").read_text())
    for record in state["log_history"]:
        record |= {"loss": 2 * record["loss"]} if "loss" in record else {}
    (twin / "trainer_state.json").write_text(json.dumps(state))
    found = page(write_report([finished, twin], tmp_path / "two.html", pictures=tmp_path / "pictures"))
    assert found.rows["binary layers"] == ["12", "12"]
    assert {"training loss at the end"} == found.marked
    assert "2 runs side by side" in found.text and "other/finished" in found.text
    assert len(found.pictures) == 2 * 4 + 1
    assert (tmp_path / "pictures" / "compare.png").is_file()
    assert (tmp_path / "pictures" / "other" / "finished" / "progress.png").is_file()


def test_the_last_evaluation_counts_although_it_came_after_the_state(finished: Path) -> None:
    state = json.loads((finished / "trainer_state.json").read_text())
    state["log_history"] = [r for r in state["log_history"] if not (r["step"] == STEPS and "eval_loss" in r)]
    copied = finished.parent / "without"
    shutil.copytree(finished, copied)
    (copied / "trainer_state.json").write_text(json.dumps(state))
    for checkpoint in copied.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    expected = json.loads((finished / "all_results.json").read_text())["eval_accuracy"]
    steps, values = read_run(copied).series("eval_accuracy")
    assert steps[-1] == STEPS and values[-1] == expected


def test_nothing_of_a_run_is_executed_nor_taken_for_html(copy: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt"):
        (copy / name).write_bytes(pickle.dumps(Bomb()))
    bad = copy.parent / "<img src=x onerror=alert(1)>"
    copy.rename(bad)
    record_run(bad, {"<script>": "</td><script>"}, ["python", "</td><script>alert(1)</script>"])
    found = page(write_report([bad]))
    assert not (tmp_path / "exploded").exists()
    assert "<img src=x onerror=alert(1)>" in found.text and "<script>alert(1)</script>" in found.rows["command"][0]


def test_without_matplotlib_there_is_a_report_and_the_extra_is_named(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "page.html"
    status, said = messages(capsys, caplog, "report", str(finished), "--out", str(out))
    assert status == 0 and "pip install 'stompp-hf[plots]'" in said
    found = page(out)
    assert not found.pictures and "stompp-hf[plots]" in found.text and found.rows["binary layers"] == ["12"]


def test_a_browser_shows_it(finished: Path, tmp_path: Path) -> None:
    names = [os.environ.get("CHROMIUM", ""), *BROWSERS]
    browser = next(filter(None, map(shutil.which, filter(None, names))), None)
    if browser is None:
        pytest.skip(f"no Chromium: none of {', '.join(BROWSERS)} is installed, and CHROMIUM names none")
    out, shot = write_report([finished, finished], tmp_path / "page.html"), tmp_path / "page.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run(
        [*command, "--window-size=1400,2600", f"--screenshot={shot}", out.as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    with Image.open(shot) as picture:
        assert picture.size == (1400, 2600)
        # Maps and marked rows are blue: the style and the inline pictures have passed the page's own policy.
        pixels = np.asarray(picture.convert("RGB").resize((700, 1300)), dtype=int)
        assert (pixels[..., 2] > pixels[..., 0] + 60).sum() > 5000


# ---- broken input ----


def damage(path: Path, text: str = '{"log_history": [') -> None:
    """Cut a JSON file off, as a full disk does."""
    path.write_text(text)


BREAKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no log history": (lambda run: [path.unlink() for path in run.rglob("trainer_state.json")], "No log history"),
    "damaged state, older one used": (lambda run: damage(run / "trainer_state.json"), "trainer_state.json is damaged"),
    "state that is no object": (lambda run: damage(run / "trainer_state.json", "[1, 2]"), "holds no JSON object"),
    "damaged results": (lambda run: damage(run / "all_results.json"), "all_results.json is damaged"),
    "damaged record": (lambda run: damage(run / "run.json", "{"), "run.json is damaged"),
    "no record": (lambda run: (run / "run.json").unlink(), "No run.json"),
    "odd record": (lambda run: damage(run / "run.json", '{"versions": 3, "command": 4, "options": []}'), ""),
    "cut weights": (lambda run: os.truncate(run / "model.safetensors", 5000), "damaged or cut off"),
    "no weights": (
        lambda run: [path.unlink() for path in run.rglob("model.safetensors")],
        "has neither model.safetensors nor",
    ),
    "not binarized": (lambda run: _edit(run, quantization_config=None), "No StoMPP plan"),
    "of a newer release": (lambda run: _edit(run, quantization_config__format_version=99), "format_version is 99"),
    "mixed versions": (lambda run: _edit(run, transformers_version="4.0.0"), "Mixed versions"),
    "odd numbers": (lambda run: _odd(run), ""),
    "empty log": (lambda run: [damage(p, '{"log_history": []}') for p in run.rglob("trainer_state.json")], "is empty"),
}


def _edit(run: Path, **changes: Any) -> None:
    """Change config.json: `a__b` is entry b of entry a; None removes."""
    for path in run.rglob("config.json"):
        config = json.loads(path.read_text())
        for key, value in changes.items():
            group, _, inner = key.rpartition("__")
            target = config[group] if group else config
            target[inner] = value
            if value is None:
                del target[inner]
        path.write_text(json.dumps(config))


def _odd(run: Path) -> None:
    """Numbers that are none, in records that are half there."""
    path = run / "trainer_state.json"
    state = json.loads(path.read_text())
    odd = [{"step": 1, "loss": "nan"}, {"loss": 1.0}, {"step": None, "eval_accuracy": 0.5}, 7, {"step": 2, "loss": [1]}]
    state["log_history"] = [*odd, {"step": 3, "loss": float("nan"), "stompp_x/": 1.0}, *state["log_history"]]
    path.write_text(json.dumps({**state, "max_steps": "twenty", "global_step": 20.0}))


def test_a_class_that_transformers_has_not_is_shown_from_its_files(copy: Path) -> None:
    _edit(copy, architectures=["NoSuchModel"])
    assert main(["report", str(copy)]) == 0
    assert "NoSuchModel: 12 layers binary" in page(copy / "report.html").text


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_broken_is_said_and_the_rest_is_shown(
    name: str, copy: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    change, expected = BREAKS[name]
    change(copy)
    status, said = messages(capsys, caplog, "report", str(copy))
    assert status == 0 and "Traceback" not in said, said
    assert expected in said, said
    found = page(copy / "report.html")
    assert expected in found.text
    assert name == "not binarized" or name == "of a newer release" or "real: classifier: head" in found.text
    assert not list(copy.glob(".*"))


def test_a_run_that_died_has_only_checkpoints(copy: Path) -> None:
    """The last checkpoint broke off before trainer_state.json, as a kill during a save leaves it."""
    for path in copy.iterdir():
        if path.is_file():
            path.unlink()
    for folder in copy.glob("checkpoint-*"):
        if folder.name not in ("checkpoint-6", "checkpoint-12"):
            shutil.rmtree(folder)
    shutil.copytree(copy / "checkpoint-12", copy / "checkpoint-18")
    damage(copy / "checkpoint-18" / "trainer_state.json")
    os.truncate(copy / "checkpoint-18" / "model.safetensors", 100)
    run = read_run(copy)
    assert (run.step, run.max_steps) == (12, STEPS)
    found = page(write_report([copy]))
    assert found.rows["steps"] == ["12 of 20"] and found.rows["stages frozen"] == ["1 of 2"]
    assert "The run ended at step 12 of 20" in found.text and len(found.pictures) >= 3


def test_a_packed_folder_has_a_report_too(finished: Path, tmp_path: Path) -> None:
    pack_model(AutoModelForSequenceClassification.from_pretrained(finished)).save_pretrained(tmp_path / "packed")
    found = page(write_report([tmp_path / "packed"]))
    assert found.rows["format"] == ["packed"] and "8 weights a byte" in found.text
    assert "No log history" in found.text


@pytest.mark.parametrize(
    ("binarize", "gone", "kept"),
    [({"binarize": "nothing"}, "stages frozen", "binarize"), ({"start": 0.0, "end": 0.0}, "no", "stages frozen")],
)
def test_baselines_have_reports(binarize: dict[str, Any], gone: str, kept: str, tmp_path: Path) -> None:
    """Full precision, where nothing freezes, and vanilla STE, where everything is frozen from the first step."""
    trainer = run_trainer(tmp_path, frozen_gradient="ste", **binarize)
    found = page(write_report([tmp_path]))
    assert kept in found.rows and found.rows.get(gone, ["unknown"]) == ["unknown"]
    assert run_of(trainer).frozen_fractions([0])[:1] in ([], [[1.0]])


def test_folders_that_hold_no_run_are_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    damage(tmp_path / "damaged" / "trainer_state.json")
    (tmp_path / "file").touch()
    cases = {
        "empty": "holds no run: it has no trainer_state.json",
        "nowhere": "is no folder",
        "file": "is no folder",
        "damaged": "trainer_state.json is damaged",
    }
    for name, words in cases.items():
        status, said = messages(capsys, caplog, "report", str(finished), str(tmp_path / name))
        assert status == 1 and "error: " in said and words in said
    status, said = messages(capsys, caplog, "report", str(finished), "--out", str(tmp_path / "file" / "page.html"))
    assert status == 1 and "cannot be written" in said
    assert not (finished / "report.html").exists()
    with pytest.raises(RunError, match="at least one folder"):
        write_report([])


def test_a_plain_model_without_history_is_shown_as_one(tmp_path: Path) -> None:
    CASES["bert"].build().save_pretrained(tmp_path)
    found = page(write_report([tmp_path]))
    assert re.search("No StoMPP plan.*Was binarize_model called", found.text)

"""What a terminal shows: who speaks, each thing once, few numbers a line, and how a run ended."""

import json
import logging
import subprocess
import sys
import textwrap
from typing import Any

import pytest
from models import CASES
from test_callback import StopAt, bert, trainer_of, warnings

from stompp_hf import Progression, StoMPPTrainerCallback, console

BERT = CASES["bert"]
logger = logging.getLogger("stompp_hf.somewhere")

SETUPS = {
    "nothing": ("", "[stompp_hf] careful: 3\n"),
    "basicConfig": ("logging.basicConfig()", "WARNING:stompp_hf.somewhere:careful: 3\n"),
    "own handler": (
        "h = logging.StreamHandler(); h.setFormatter(logging.Formatter('own %(message)s'));"
        "logging.getLogger('stompp_hf').addHandler(h)",
        "own careful: 3\n",
    ),
    "transformers' verbosity": (
        "import transformers; transformers.logging.set_verbosity_info(); transformers.logging.enable_propagation()",
        "[stompp_hf] careful: 3\n",
    ),
    "silenced": ("logging.getLogger('stompp_hf').setLevel(logging.ERROR)", ""),
    "info asked for": (
        "logging.getLogger('stompp_hf').setLevel(logging.INFO)",
        "[stompp_hf] plan\n[stompp_hf] careful: 3\n",
    ),
}


def test_warnings_carry_the_librarys_name_and_come_once() -> None:
    """In fresh processes, of one that has imported everything: logging is set up for a whole process."""
    code = """
        import json, logging, os, sys
        import stompp_hf
        for setup in json.loads(sys.argv[1]):
            read, write = os.pipe()
            if os.fork() == 0:
                os.dup2(write, 2)
                exec(setup)
                logger = logging.getLogger("stompp_hf.somewhere")
                logger.info("plan")
                logger.warning("careful: %d", 3)
                sys.stderr.flush()
                os._exit(0)
            os.close(write)
            os.wait()
            print(json.dumps(os.fdopen(read).read()))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), json.dumps([setup for setup, _ in SETUPS.values()])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = dict(zip(SETUPS, map(json.loads, done.stdout.splitlines()), strict=True))
    assert said == {name: expected for name, (_, expected) in SETUPS.items()}


def test_a_bar_is_moved_out_of_the_way(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own
    from tqdm import tqdm

    with tqdm(total=3, file=sys.stderr, ncols=40) as bar:
        bar.update(1)
        logger.warning("careful")
    lines = capsys.readouterr().err.replace("\r", "\n").split("\n")
    assert "[stompp_hf] careful" in lines and any("1/3" in line for line in lines)


def test_the_same_about_the_same_is_said_once_and_new_facts_are_said(caplog: Any) -> None:
    class Thing:
        """Something to speak of."""

    one, other = Thing(), Thing()
    for about, step in ((one, 1), (one, 1), (one, 2), (other, 1)):
        console.warn_once(logger, about, "step %d", step)
    assert warnings(caplog, "step") == ["step 1", "step 2", "step 1"]
    assert {record.filename for record in caplog.records} == {"test_console.py"}


def test_looking_at_a_model_twice_warns_once(caplog: Any) -> None:
    model = bert(refresh_rate=100)
    for _ in range(3):
        Progression(model, 20)
    assert len(warnings(caplog, "stages freeze within 8 steps")) == 1


# ---- Trainer's lines ----


def loss_lines(text: str) -> list[str]:
    """The loss lines that Trainer printed."""
    return [line for line in text.splitlines() if "'loss'" in line]


FOUR = ["stompp_frozen_fraction", "stompp_stage", "stompp_stage_fraction", "stompp_flip_ratio"]


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize(
    ("asked", "trackers", "sampled"),
    [({}, [], False), ({"metrics_every": 2}, [], True), ({"metrics_every": 0}, [], False), ({}, ["mine"], True)],
    ids=["default", "asked for", "none", "tracker"],
)
def test_loss_lines_have_four_of_our_numbers_and_the_sampled_ones_where_they_are_asked_for(
    tmp_path: Any, capsys: Any, attached: bool, asked: dict[str, Any], trackers: list[str], sampled: bool
) -> None:
    callback = StoMPPTrainerCallback(**asked)
    trainer = trainer_of(tmp_path, bert(), *([] if attached else [callback]), max_steps=4)
    trainer.args.report_to = trackers
    if attached:
        callback.attach(trainer)
    trainer.train()
    first, *_ = lines = loss_lines(capsys.readouterr().out)
    assert len(lines) == 2 and all(name in line for name in FOUR for line in lines)
    assert (first.count("'stompp_") > 4) == sampled
    assert sampled or all(line.count("'stompp_") == 4 for line in lines)
    record = next(record for record in trainer.state.log_history if "loss" in record)
    assert ("stompp_blocked_share" in record) == (asked.get("metrics_every") != 0)  # the record has what was measured


def test_a_run_ends_with_a_line_that_says_so(tmp_path: Any, caplog: Any) -> None:
    trainer_of(tmp_path, bert(), StoMPPTrainerCallback()).train()
    assert caplog.records[-1].getMessage() == "fully binary: 12 layers, at step 20."
    assert caplog.records[-1].levelname == "INFO"


@pytest.mark.parametrize("how", ["cut short", "nothing"])
def test_a_run_that_is_not_binary_does_not_say_so(tmp_path: Any, caplog: Any, how: str) -> None:
    model = bert(binarize="nothing") if how == "nothing" else bert()
    callbacks = [StopAt(6)] if how == "cut short" else []
    trainer_of(tmp_path, model, StoMPPTrainerCallback(), *callbacks, max_steps=8).train()
    assert "fully binary: " not in caplog.text

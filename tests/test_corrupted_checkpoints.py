"""Damaged checkpoints, some hundreds of them: each gives a clear error, or the logits of the intact one.

Clear is an error of this library, whatever its cause, that does not show our insides; or one that transformers or
safetensors raises before our code has a say. Never random weights, never code out of a checkpoint. Only without its
quant_method a checkpoint cannot reach this library at all: then transformers fills layers at random, and warns.

Every damage is made from a seed; the commands must print one line for each, and no stack trace.
"""

import json
import random
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from damages import CONFIG, FAMILIES, INDEX, WEIGHTS, shard, stray_bits
from models import CASES, logits, quick, train
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertConfig
from transformers.utils import logging as hf_logging

import stompp_hf
from stompp_hf import StoMPPError, binarize_model, pack_model
from stompp_hf.cli import main
from stompp_hf.errors import CheckpointError

BERT = CASES["bert"]
STEPS = 4
HOME = str(Path(stompp_hf.__file__).parent)
PASSED_ON = ("asked", "from_pretrained")
"""Of our frames those of the wrapped from_pretrained: errors of others pass through it."""


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """A finished checkpoint in the training format and the same packed, and their logits."""
    config = BertConfig(**{**BERT.config().to_dict(), "intermediate_size": 44})
    torch.manual_seed(0)
    model = binarize_model(AutoModelForSequenceClassification.from_config(config), quick())
    train(model, BERT, 0, STEPS, STEPS)
    folder, found = tmp_path_factory.mktemp("intact"), {}
    for kind in ("training", "packed"):
        if kind == "packed":
            pack_model(model)
        model.save_pretrained(folder / kind)
        found[kind] = (folder / kind, logits(model, BERT.batch()))
    return found


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    hf_logging.disable_progress_bar()
    yield
    hf_logging.enable_progress_bar()


def reports_random(record: Any) -> bool:
    return "Unknown quantization type" in record.getMessage() or "MISSING" in record.getMessage()


@pytest.mark.parametrize("kind", ["training", "packed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_damage(name: str, kind: str, intact: Any, tmp_path: Path, caplog: Any, capsys: Any) -> None:
    count, damage = FAMILIES[name]
    source, expected = intact[kind]
    for number in range(count // 2):
        folder = tmp_path / str(number)
        shutil.copytree(source, folder)
        damage(folder, random.Random(f"{name} {kind} {number}"))
        caplog.clear()
        what = outcome(folder, expected)
        if what == "differs":
            assert any(map(reports_random, caplog.records)), (folder, "other logits, and not a word")
            reached = json.loads((folder / CONFIG).read_text()).get("quantization_config")
            assert not isinstance(reached, dict) or reached.get("quant_method") != "stompp", (folder, "reached us")
        word = {"training": "pack", "packed": "unpack"}[kind]
        for command in (["inspect", str(folder)], [word, str(folder), str(folder / "new")]):
            status, output = main(command), capsys.readouterr()
            assert status in (0, 1) and "Traceback" not in output.err
            if status:
                assert output.err.count("error: ") == 1 and str(folder) in output.err, output.err
        assert not (folder / "new").exists() or main(["inspect", str(folder / "new")]) == 0
        assert not (folder / "executed").exists() and not Path("executed").exists()


def outcome(folder: Path, expected: torch.Tensor) -> str:
    """Load a checkpoint; what came of it. An error that escapes from this library's insides fails the test."""
    try:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
    except StoMPPError as error:
        assert len(str(error)) > 20
        return "ours"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if frame.filename.startswith(HOME) and frame.name not in PASSED_ON]
        assert not ours, (folder, repr(error))
        return "theirs"
    try:
        return "equal" if torch.equal(logits(model, BERT.batch()), expected) else "differs"
    except StoMPPError:
        return "ours"


def test_there_are_enough() -> None:
    assert sum(count // 2 * 2 for count, _ in FAMILIES.values()) >= 200


def test_intact_copies_load(intact: Any, tmp_path: Path) -> None:
    """The judge itself: it calls the intact ones equal, also in shards, and other weights different."""
    for kind, (source, expected) in intact.items():
        assert outcome(source, expected) == "equal" and outcome(source, expected + 1) == "differs"
        shutil.copytree(source, tmp_path / kind)
        (tmp_path / kind / INDEX).write_text(json.dumps(shard(tmp_path / kind)))
        assert outcome(tmp_path / kind, expected) == "equal"


def test_stray_bits_are_named(intact: Any, tmp_path: Path) -> None:
    shutil.copytree(intact["packed"][0], tmp_path / "packed")
    stray_bits(tmp_path / "packed", random.Random(0))
    with pytest.raises(CheckpointError, match=r"output\.dense: weight_bits holds bits behind the end of its rows"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    model = AutoModelForSequenceClassification.from_pretrained(intact["packed"][0])
    with pytest.raises(RuntimeError, match="weight_bits holds bits behind the end"):
        model.load_state_dict(load_file(tmp_path / "packed" / WEIGHTS))

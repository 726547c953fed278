"""Cards say how to load a checkpoint, and truly; what is pushed to a hub comes back as it was."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import local_hub
from huggingface_hub import ModelCard
from models import CASES, logits, quick, train
from transformers import AutoModelForSequenceClassification

from stompp_hf import StoMPPConfig, binarize_model, model_card, pack_model, write_model_card
from stompp_hf.checkpoints.inspection import inspect
from stompp_hf.cli import main
from stompp_hf.errors import CheckpointError

BERT = CASES["bert"]
STEPS = 4

PUSH = """
import sys
import transformers
import stompp_hf
folder, run = sys.argv[1:]
Auto = transformers.AutoModelForSequenceClassification
print(stompp_hf.push_to_hub(Auto.from_pretrained(folder), "user/by_function", metrics={"accuracy": 0.875}))
Auto.from_pretrained(folder).push_to_hub("user/by_model")
args = transformers.TrainingArguments(run, hub_model_id="user/by_trainer", use_cpu=True, report_to="none", max_steps=1)
trainer = transformers.Trainer(Auto.from_pretrained(folder), args)
stompp_hf.StoMPPTrainerCallback().attach(trainer)
trainer.push_to_hub(tags=["mine"], finetuned_from="a/base", tasks="text-classification")
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A packed BERT and its logits."""
    folder = tmp_path_factory.mktemp("shipped") / "tiny-bert"
    model = binarize_model(BERT.build(), quick())
    train(model, BERT, 0, STEPS, STEPS)
    pack_model(model).save_pretrained(folder)
    return folder, logits(model, BERT.batch())


def code_of(card: str) -> str:
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[-1]


def test_what_it_says(packed: tuple[Path, torch.Tensor]) -> None:
    card = model_card(packed[0], metrics={"accuracy": 0.875}, base_model="a/base", repo_id="user/tiny")
    assert card.data.tags == ["stompp", "1-bit", "binary"] and card.data.base_model == "a/base"
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-classification"
    assert card.data.base_model_relation == "quantized" and "relation" not in str(model_card(packed[0]))
    found, text = inspect(packed[0]), str(card)
    for words in (
        "import stompp_hf  # registers", 'BertForSequenceClassification.from_pretrained("user/tiny")',
        "12 layers, in 2 stages: `bert.encoder.layer.0`, `bert.encoder.layer.1`", "8 a byte", "| accuracy | 0.875 |",
        "`bert.pooler.dense`, `classifier` (head: ", f"| bits | {found.sizes['bits']:,} |", f"| {found.total:,} |",
        f"{found.as_float32 / found.total:.1f} times less", "Stored as float32", "# user/tiny",
    ):  # fmt: skip
        assert words in text, words
    assert not (packed[0] / "README.md").exists()


def test_the_import_comes_first_and_why(packed: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    assert code_of(str(model_card(packed[0]))).startswith("import stompp_hf")
    assert "Without the first line transformers only logs" in str(model_card(packed[0]))
    assert "and fills the binary layers at random." in str(model_card(packed[0]))
    binarize_model(BERT.build(), quick()).save_pretrained(tmp_path)
    card = str(model_card(tmp_path))
    assert code_of(card).startswith("import stompp_hf")
    assert "loads the latent weights as a model in full precision" in card and "worse than random" in card


def test_its_code_runs(packed: tuple[Path, torch.Tensor]) -> None:
    names: dict[str, Any] = {}
    exec(code_of(str(model_card(packed[0], repo_id=str(packed[0])))), names)
    assert torch.equal(logits(names["model"], BERT.batch()), packed[1])


def test_a_card_that_is_there_is_kept_and_brought_up_to_date(packed: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    for path in packed[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    own = "---\nlicense: mit\ntags:\n- mine\nbase_model: a/base\n---\n\n# My model\n\nHand-written.\n"
    (tmp_path / "README.md").write_text(own)
    write_model_card(tmp_path, metrics={"accuracy": 0.5})
    once = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(once + "\nWritten after it.\n")
    assert main(["card", "--metric", "accuracy=0.75", str(tmp_path)]) == 0
    twice = (tmp_path / "README.md").read_text()
    for words in ("# My model", "Hand-written.", "Written after it.", "| accuracy | 0.75 |"):
        assert twice.count(words) == 1
    assert twice.count("import stompp_hf") == 1 and "| accuracy | 0.5 |" not in twice
    data = ModelCard(twice).data
    assert data.license == "mit" and data.base_model == "a/base" and data.tags == ["mine", "stompp", "1-bit", "binary"]
    (tmp_path / "README.md").write_text("---\ntags: [\n---\n")
    assert main(["card", str(tmp_path)]) == 1


def test_what_is_no_checkpoint_and_what_is_not_binary(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        write_model_card(tmp_path)
    binarize_model(BERT.build(), StoMPPConfig(binarize="nothing")).save_pretrained(tmp_path)
    assert "nothing, as a baseline in full precision" in str(model_card(tmp_path))


def test_commands_write_one(packed: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    assert main(["unpack", str(packed[0]), str(tmp_path / "training")]) == 0
    text = (tmp_path / "training" / "README.md").read_text()
    assert "It holds latent weights" in text and 'from_pretrained("training")' in text


def test_pushed_to_a_hub(packed: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    with local_hub(tmp_path / "hub") as address:
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_" + "x" * 34}
        environment |= {"HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-c", PUSH, str(packed[0]), str(tmp_path / "run")]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"{address}/user/by_function/commit/" in result.stdout
    for name in ("by_function", "by_model", "by_trainer"):
        arrived = tmp_path / "hub" / "user" / name
        model = AutoModelForSequenceClassification.from_pretrained(arrived)
        assert torch.equal(logits(model, BERT.batch()), packed[1]), name
    cards = {
        name: (tmp_path / "hub" / "user" / name / "README.md").read_text() for name in ("by_function", "by_trainer")
    }
    for name, card in cards.items():
        assert "import stompp_hf" in code_of(card) and f'from_pretrained("user/{name}")' in code_of(card)
        assert {"stompp", "1-bit"} <= set(ModelCard(card).data.tags)
    assert "| accuracy | 0.875 |" in cards["by_function"]
    assert "Training procedure" in cards["by_trainer"] and "mine" in ModelCard(cards["by_trainer"]).data.tags

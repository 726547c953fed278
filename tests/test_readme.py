"""The Python blocks of the README run, in order, as one script: on a tiny local model in place of the hub's."""

import re
from pathlib import Path

import onnxruntime
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from stompp_hf import get_plan

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    """The README's code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def names(tmp_path: Path) -> dict[str, object]:
    """What the blocks take for granted: a checkpoint, data, arguments, a loader, an optimizer."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "checkpoint")
    rows = [{"input_ids": torch.randint(1, 50, (6,)), "labels": torch.tensor(i % 2)} for i in range(16)]
    args = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=8, per_device_train_batch_size=4, report_to="none",
        use_cpu=True, disable_tqdm=True, logging_steps=2, save_strategy="no",
    )  # fmt: skip
    return {"args": args, "train_dataset": rows, "max_steps": 8, "tmp_path": tmp_path}


def test_python_blocks_run(
    names: dict[str, object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path = names["tmp_path"]
    assert isinstance(tmp_path, Path)
    monkeypatch.chdir(tmp_path)
    python = blocks("python")
    assert len(python) == 10
    training, reloading, refinements, teaching, loop, seeing, shipping, exporting, fusing, adapting = (
        block.replace("bert-base-uncased", "checkpoint") for block in python
    )

    exec(training, names)
    trained = names["model"]
    exec(reloading, names)
    reloaded = names["model"]
    inputs = {"input_ids": torch.arange(1, 7).reshape(1, 6)}
    # Not bit for bit: the trained model's head still lies where transformers loaded it, at any address.
    torch.testing.assert_close(
        *(model.eval()(**inputs).logits for model in (trained, reloaded)),  # type: ignore[attr-defined]
        rtol=1e-6, atol=1e-7,
    )  # fmt: skip

    names["model"] = fresh(names)
    exec(refinements, names)
    assert "stompp_frozen_fraction" in names["trainer"].state.log_history[0]  # type: ignore[attr-defined]

    names["model"] = BertForSequenceClassification.from_pretrained("checkpoint")
    exec(teaching, names)
    last = [record for record in names["trainer"].state.log_history if "loss" in record][-1]  # type: ignore[attr-defined]
    assert last["stompp_hidden"] > 0 and last["stompp_frozen_fraction"] == 1

    names["model"] = model = fresh(names).train()
    rows = names["train_dataset"]
    assert isinstance(rows, list)
    names["loader"] = [{"input_ids": row["input_ids"][None], "labels": row["labels"][None]} for row in rows[:8]]
    names["optimizer"] = torch.optim.AdamW(model.parameters(), lr=1e-3)
    exec(loop, names)
    assert names["progression"].is_complete()  # type: ignore[attr-defined]

    capsys.readouterr()
    exec(seeing, names)
    assert "100.0% of these frozen" in capsys.readouterr().out

    expected = model.eval()(**inputs).logits
    exec(shipping, names)
    shipped = names["model"]
    assert shipped is not model and get_plan(shipped).packed  # type: ignore[arg-type]
    torch.testing.assert_close(shipped(**inputs).logits, expected, rtol=1e-6, atol=1e-7)  # type: ignore[operator]

    exec(exporting, names)
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    feed = {"input_ids": inputs["input_ids"].numpy(), "attention_mask": torch.ones(1, 6, dtype=torch.long).numpy()}
    torch.testing.assert_close(torch.from_numpy(session.run(None, feed)[0]), expected, rtol=1e-4, atol=5e-6)

    exec(fusing, names)
    assert names["model"] is shipped
    torch.testing.assert_close(shipped(**inputs).logits, expected, rtol=1e-6, atol=1e-7)  # type: ignore[operator]

    training, reloading = adapting.rsplit("\n\n", 1)
    exec(training, names)
    trained = names["model"].eval()(**inputs).logits  # type: ignore[attr-defined]
    exec(reloading, names)
    assert torch.equal(names["model"](**inputs).logits, trained)  # type: ignore[operator]
    assert not torch.equal(trained, expected)


def fresh(names: dict[str, object]) -> torch.nn.Module:
    """The checkpoint, binarized."""
    from stompp_hf import StoMPPConfig, binarize_model

    model = BertForSequenceClassification.from_pretrained("checkpoint")
    return binarize_model(model, StoMPPConfig(refresh_rate=2))


def test_commands_install_with_the_constraints() -> None:
    demo, tests = blocks("bash")[:2]
    for command in (demo, tests):
        assert "pip install -c tests/constraints.txt" in command
    assert "examples/run_glue.py" in demo
    assert "pytest" in tests

"""The README and the guides: their Python blocks and `python -m stompp_hf` lines run, and their links lead somewhere.

The blocks of one file run in order, as one script, on tiny local models in place of the hub's. What a file takes for
granted, and what must hold after each block, is a generator here: it yields before every block.
"""

import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import pytest
import torch
from gguf_models import byte_level, frozen
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from stompp_hf import (
    Progression,
    StoMPPConfig,
    StoMPPTrainerCallback,
    binarize_model,
    calibrate,
    get_plan,
    pack_model,
    record_run,
)
from stompp_hf.checkpoints.inspection import inspect
from stompp_hf.cli import main
from stompp_hf.method.schedules import SCHEDULES
from stompp_hf.method.surrogates import SURROGATES
from stompp_hf.modules import BINARY_CLASSES
from stompp_hf.modules.packed import PACKED_CLASSES
from stompp_hf.training.live_metrics import SAMPLED

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GUIDES = [
    ROOT / "stompp_hf" / "README.md",
    ROOT / "tests" / "README.md",
    *sorted((ROOT / "examples").rglob("*.md")),
]
MOST_BYTES = 9000
"""Of the README: two screens."""
COMMAND = "python -m stompp_hf "
RUN_BEFORE = {"runs/sst2_binary": "out", "runs/lm": "lm"}
"""Folders that a command reads, and that a long command before it would have made; and what stands for each."""
INPUTS = {"input_ids": torch.arange(1, 7).reshape(1, 6)}

Names = dict[str, Any]
Steps = Iterator[None]
pages = pytest.mark.parametrize("path", [README, *GUIDES], ids=lambda path: str(path.relative_to(ROOT)))


def blocks(path: Path) -> list[tuple[str, str]]:
    """The language and the text of each code block of a file."""
    return re.findall(r"```(\w+)\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def runs(path: Path) -> bool:
    """Whether a file has code that runs here."""
    return any(language == "python" or f"\n{COMMAND}" in f"\n{text}" for language, text in blocks(path))


# ---- what the blocks take for granted ----


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints: plain, trained to the end and packed ones, of tiny models; and two runs."""
    here = tmp_path_factory.mktemp("workshop")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    BertForSequenceClassification(config).save_pretrained(here / "checkpoint")
    tokenizer = byte_level()
    causal = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(causal).save_pretrained(here / "causal")
    frozen(LlamaForCausalLM(causal)).save_pretrained(here / "lm")
    for name in ("causal", "lm"):
        tokenizer.save_pretrained(here / name)
    model = finished(here)
    model.save_pretrained(here / "out")
    pack_model(model).save_pretrained(here / "packed")
    for name in ("forward", "reverse"):
        args = arguments(here / "runs" / name, max_steps=4)
        model = fresh(here, order=name)
        trainer = Trainer(model, args, train_dataset=sentences(), callbacks=[StoMPPTrainerCallback()])
        trainer.train()
        trainer.save_model()
        trainer.save_state()
        record_run(args.output_dir)
    return here


@pytest.fixture
def names(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Names:
    """In a copy of the workshop: a binarized model, data, arguments, a loader, an optimizer."""
    here = tmp_path / "here"
    shutil.copytree(workshop, here)
    monkeypatch.chdir(here)
    torch.manual_seed(0)
    rows = sentences()
    model = fresh()
    return {
        "args": arguments(here / "run"),
        "compute_metrics": lambda prediction: {
            "accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())
        },
        "loader": [{name: value[None] for name, value in row.items()} for row in rows[:8]],
        "max_steps": 8,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "torch": torch,
        "train_dataset": rows,
    }


def sentences() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(1, 50, (6,)), "labels": torch.tensor(i % 2)} for i in range(16)]


def arguments(folder: Path, max_steps: int = 8) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), max_steps=max_steps, per_device_train_batch_size=4, report_to="none",
        use_cpu=True, disable_tqdm=True, logging_steps=2, save_strategy="no",
    )  # fmt: skip


def fresh(folder: Path = Path(), **options: Any) -> torch.nn.Module:
    """The checkpoint, binarized."""
    model = BertForSequenceClassification.from_pretrained(folder / "checkpoint")
    return binarize_model(model, StoMPPConfig(refresh_rate=2, **options)).train()


def finished(folder: Path = Path()) -> Any:
    """The same with every stage frozen."""
    model = fresh(folder)
    Progression(model, total_steps=2).step(2)
    calibrate(model, [INPUTS])
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**INPUTS).logits


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    """Not bit for bit: parameters lie where transformers loaded them, at any address, and torch sums by it."""
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


# ---- file by file: `yield` stands before each Python block ----


def readme(names: Names) -> Steps:
    yield
    trained = names["model"]
    expected = logits(trained)
    assert names["trainer"].state.log_history[-2]["stompp_frozen_fraction"] == 1
    yield
    packed = names["model"]
    assert packed is not trained and get_plan(packed).packed
    close(logits(packed), expected)
    yield
    assert names["progression"].is_complete()


def training(names: Names) -> Steps:
    yield
    assert "stompp_frozen_fraction" in names["trainer"].state.log_history[0]
    names["model"] = BertForSequenceClassification.from_pretrained("checkpoint")
    yield
    last = [record for record in names["trainer"].state.log_history if "loss" in record][-1]
    assert last["stompp_hidden"] > 0 and last["stompp_frozen_fraction"] == 1
    names["model"] = BertForSequenceClassification.from_pretrained("checkpoint")
    names["args"].per_device_eval_batch_size = 16
    yield
    stop = names["stop"]
    assert stop.full_precision is not None and get_plan(names["model"]).freezing == stop.good_stages
    yield
    assert get_plan(names["model"]).entries
    yield
    assert names["vanilla"].end == 0 and not names["real"].binary_weights


def modules(names: Names) -> Steps:
    yield
    assert type(names["model"].bert.encoder.layer[0].output.dense) is torch.nn.Linear
    yield
    attention = binarize_model(BertForSequenceClassification.from_pretrained("checkpoint"), names["config"])
    assert any("attention" in type(module).__name__.lower() for module in attention.modules())


def shipping(names: Names) -> Steps:
    names["model"] = model = finished()
    expected = logits(model)
    yield
    assert get_plan(model).packed and torch.equal(logits(model), expected)
    yield
    assert "0.859" in Path("packed", "README.md").read_text()
    yield
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    feed = {"input_ids": INPUTS["input_ids"].numpy(), "attention_mask": numpy.ones((1, 6), dtype=numpy.int64)}
    torch.testing.assert_close(torch.from_numpy(session.run(None, feed)[0]), expected, rtol=1e-4, atol=5e-6)


def inference(names: Names) -> Steps:
    names["model"] = model = pack_model(finished())
    expected = logits(model)
    yield
    assert names["model"] is model
    assert torch.equal(logits(model), expected)


def adapters(names: Names) -> Steps:
    base = logits(pack_model(finished()))
    yield
    trained = logits(names["model"])
    yield
    assert torch.equal(logits(names["model"]), trained)
    assert not torch.equal(trained, base)


def reports(names: Names) -> Steps:
    yield
    yield
    assert names["progression"].is_complete()
    assert {"stompp_frozen_fraction", "stompp_flip_ratio", "stompp_blocked_share"} <= set(names["record"])
    names["model"] = fresh()
    yield
    assert all(Path(names["args"].output_dir, name).exists() for name in ("run.json", "stages.json"))
    yield
    names["figure"].savefig("progress.png")


def llm(names: Names) -> Steps:
    names["text_dataset"] = [dict(row, labels=row["input_ids"]) for row in names["train_dataset"]]
    names["prompt"] = dict(INPUTS)
    yield
    assert get_plan(names["model"]).packed and names["tokens"].shape[0] == 1
    assert inspect(Path("packed-lm")).plan.packed
    yield
    assert Path("packed-lm.gguf").read_bytes()[:4] == b"GGUF"


def inside(names: Names) -> Steps:
    yield
    yield
    yield
    assert len(get_plan(names["model"]).entries) > 0
    yield
    assert names["progression"].is_complete() and names["record"]["stompp_largest_gradient"] >= 0
    yield
    assert numpy.load("model.npz")
    yield
    yield


def no_python(names: Names) -> Steps:
    yield from ()


STEPS: dict[str, Callable[[Names], Steps]] = {
    "README.md": readme,
    "examples/guides/adapters.md": adapters,
    "examples/guides/inference.md": inference,
    "examples/guides/llm.md": llm,
    "examples/guides/modules.md": modules,
    "examples/guides/reports.md": reports,
    "examples/guides/shipping.md": shipping,
    "examples/guides/training.md": training,
    "stompp_hf/README.md": inside,
}


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """What the blocks add stays in their test."""
    added_to: list[dict[Any, Any]] = [SCHEDULES, SURROGATES, SAMPLED, BINARY_CLASSES, PACKED_CLASSES]
    before = [dict(registry) for registry in added_to]
    yield
    for registry, items in zip(added_to, before, strict=True):
        registry.clear()
        registry.update(items)


@pytest.mark.parametrize("path", filter(runs, [README, *GUIDES]), ids=lambda path: str(path.relative_to(ROOT)))
def test_blocks_run(path: Path, names: Names, capsys: pytest.CaptureFixture[str]) -> None:
    """Python, and the commands of the library; other commands are long, and tested where they belong."""
    names["__name__"] = "guide"
    steps = STEPS.get(str(path.relative_to(ROOT)), no_python)(names)
    for language, text in blocks(path):
        if language == "python":
            next(steps, None)
            local = text.replace("bert-base-uncased", "checkpoint").replace("your-causal-lm", "causal")
            exec(compile(local, str(path), "exec"), names)
            continue
        for line in text.splitlines():
            if line.startswith(COMMAND):
                for word in RUN_BEFORE.keys() & set(line.split()):
                    shutil.copytree(RUN_BEFORE[word], word)
                assert main(shlex.split(line, comments=True)[3:]) == 0, capsys.readouterr().err
    with pytest.raises(StopIteration):  # as many steps as blocks
        next(steps)


def test_every_file_with_steps_is_there() -> None:
    assert {ROOT / name for name in STEPS} <= {README, *GUIDES}


# ---- form ----


def test_the_readme_takes_two_screens() -> None:
    assert len(README.read_bytes()) <= MOST_BYTES


def test_install_lines() -> None:
    """To use the library, nobody needs the versions of the tests; the tests' own command is marked for CI."""
    bash = [text for language, text in blocks(README) if language == "bash"]
    assert bash[0] == "pip install .\n"
    assert "examples/run_glue.py" in bash[1] and "constraints" not in bash[1]
    marked = re.findall(r"<!-- tests -->\n```bash\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(marked) == 1 and "pip install -c tests/constraints.txt" in marked[0] and "pytest" in marked[0]


def anchors(path: Path) -> set[str]:
    """The names under which headings can be linked."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if link.startswith(("http:", "https:")):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{path.name}: {link}"


@pages
def test_named_files_exist(path: Path) -> None:
    """What is in backquotes, or is started by a command, and looks like a file of this repository."""
    text = path.read_text(encoding="utf-8")
    named = {word for quoted in re.findall(r"`([^`\n]+)`", text) for word in quoted.split()}
    named |= {word for _, block in blocks(path) for word in block.split() if word.startswith(("examples/", "tests/"))}
    places = (path.parent, ROOT, ROOT / "stompp_hf", ROOT / "examples" / "configs")
    for name in sorted(named):
        if re.fullmatch(r"[\w-]+\.(py|yaml)", name):
            assert any(ROOT.glob(f"[est]*/**/{name}")), f"{path.name}: `{name}`"
        elif re.fullmatch(r"[\w./-]+/[\w-]+\.(py|md|yaml|inc|h)|(examples|tests|stompp_hf)/[\w./-]+", name):
            assert any((place / name).exists() for place in places), f"{path.name}: `{name}`"


def test_pictures_are_there_and_small() -> None:
    """Each picture is shown by a guide, and in the README at most one."""
    shown = {
        path: {
            (path.parent / link).resolve()
            for link in re.findall(r"!\[[^]]+\]\(([^)]+)\)", path.read_text(encoding="utf-8"))
        }
        for path in (README, *GUIDES)
    }
    named = set().union(*shown.values())
    assert named == set((ROOT / "examples" / "pictures").rglob("*.png")) and len(named) >= 3
    assert len(shown[README]) == 1
    assert all(path.stat().st_size < 60_000 for path in named)

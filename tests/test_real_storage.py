"""What stays real in a packed checkpoint, in half precision and int8: sizes, exact reloads, ways back, refusals."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import beyond
import models
import pytest
import torch
import transformers as hf
import vision
from models import logits, quick, same_tensors, train
from safetensors.torch import load_file, save_file
from torch import nn

from stompp_hf import binarize_model, get_plan, pack_model, restore_model, unpack_model
from stompp_hf.checkpoints.inspection import inspect
from stompp_hf.cli import main
from stompp_hf.errors import CheckpointError, PackingError
from stompp_hf.modules.int8_embedding import Int8Embedding
from stompp_hf.surgery.members import members
from stompp_hf.surgery.real_storage import DTYPES, real_parameters

STEPS = 4
CASES = {**models.CASES, **vision.CASES}
BERT = CASES["bert"]
WORDS = "bert.embeddings.word_embeddings"
SHIPPED = [(name, real) for name in ("bert", "gpt2", "llama-tied", "t5", "resnet") for real in ("bfloat16", "int8")]
SHIPPED += [("bert", "float16"), ("llama", "int8")]

RELOAD = """
import sys, torch, transformers, stompp_hf
folder, results = sys.argv[1], {}
for name, (auto, batch) in torch.load(f"{folder}/batches.pt").items():
    with torch.no_grad():
        results[name] = getattr(transformers, auto).from_pretrained(f"{folder}/{name}")(**batch).logits
torch.save(results, f"{folder}/results.pt")
"""


def frozen(name: str = "bert", **options: Any) -> Any:
    model = binarize_model(CASES[name].build(), quick(**options))
    train(model, CASES[name], 0, STEPS, STEPS)
    return model.eval()


@pytest.fixture(scope="module")
def trained() -> Any:
    """A finished BERT; copy it."""
    return frozen()


def load(folder: Path, **options: Any) -> Any:
    return hf.AutoModelForSequenceClassification.from_pretrained(folder, **options)


def test_another_process_computes_the_same(tmp_path: Path) -> None:
    batches, computed, finished = {}, {}, {name: frozen(name) for name in dict(SHIPPED)}
    for name, real in SHIPPED:
        case, key = CASES[name], f"{name}-{real}"
        batch, model = case.batch(77), pack_model(copy.deepcopy(finished[name]), real=real)
        batches[key] = (case.auto.__name__, batch)
        computed[key] = logits(model, batch)
        exact = logits(finished[name], batch)
        assert 0 < (computed[key] - exact).abs().mean() < 0.3 * exact.std()
        model.save_pretrained(tmp_path / key, max_shard_size="10KB")
        files = list((tmp_path / key).glob("*.safetensors"))
        tensors = {k: tensor for file in files for k, tensor in load_file(file).items()}
        real_ones = {k: tensor for k, tensor in tensors.items() if k in real_parameters(model)}
        assert (len(files) > 1 or name == "resnet") and {tensor.dtype for tensor in real_ones.values()} == {
            DTYPES[real]
        }
        own = [f"{n}.{o}" for n, m in members(model).items() for o in m.own_tensors()]
        assert same_tensors({n: tensors[n] for n in own}, {n: model.state_dict()[n] for n in own}) == []
        tables = [n for n, m in model.named_modules() if isinstance(m, Int8Embedding)]
        assert bool(tables) == (real == "int8" and name not in ("llama-tied", "resnet")) and set(tables) == {
            n.removesuffix(".weight_int8") for n in tensors if n.endswith(".weight_int8")
        }
    torch.save(batches, tmp_path / "batches.pt")
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], check=True, timeout=500)
    assert same_tensors(torch.load(tmp_path / "results.pt"), computed) == []


def test_tables_are_rows_of_whole_numbers(trained: Any) -> None:
    model = pack_model(copy.deepcopy(trained), real="int8")
    before, table = trained.get_submodule(WORDS), model.get_submodule(WORDS)
    largest = before.weight.detach().abs().amax(1, keepdim=True)
    assert table.weight_int8.dtype == torch.int8 and table.weight_step.dtype == torch.float32
    error = (table.weight - before.weight.detach()).abs()
    assert (error <= largest / 127 * 0.5001).all() and error.max() > 0
    assert not table.weight[before.padding_idx].any()  # the row of padding stays zero
    ids = torch.tensor([[5, 0], [7, 5]])
    assert torch.equal(table(ids), table.weight[ids]) and not list(table.parameters())
    assert repr(table) == "Int8Embedding(100, 32, padding_idx=0, int8)"
    with pytest.raises((AttributeError, KeyError), match="weight"):
        table.weight = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize("real", ["float16", "bfloat16", "int8"])
def test_saved_again_cast_and_undone(trained: Any, real: str, tmp_path: Path) -> None:
    batch = BERT.batch(77)
    model = pack_model(copy.deepcopy(trained), real=real)
    expected = logits(model, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.save_pretrained(tmp_path / "twin")
        reloaded = load(tmp_path / "twin")
        assert torch.equal(logits(reloaded, batch), expected)
    assert {p.dtype for p in reloaded.parameters()} == {torch.float32} and reloaded.config.dtype == torch.float32
    plan = get_plan(reloaded)
    assert plan.packed and plan.real == real and len(plan.int8) == (3 if real == "int8" else 0)
    reloaded.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("twin", "again"))
    assert same_tensors(first, again) == []
    base = hf.AutoModel.from_pretrained(tmp_path / "again")
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        assert torch.equal(base(**inputs).pooler_output, model.bert(**inputs).pooler_output)

    half = load(tmp_path / "again", dtype=torch.bfloat16)
    steps = [tensor for name, tensor in half.state_dict().items() if name.endswith("weight_step")]
    assert half.get_submodule(WORDS).weight.dtype == logits(half, batch).dtype == torch.bfloat16
    assert all(step.dtype == torch.float32 for step in steps)
    assert torch.equal(logits(copy.deepcopy(model).to(torch.bfloat16), batch), logits(half, batch))
    assert {p.dtype for p in unpack_model(half).parameters()} == {torch.float32}

    unpacked = unpack_model(copy.deepcopy(model))
    assert torch.equal(logits(unpacked, batch), expected) and get_plan(unpacked).real == "float32"
    assert type(unpacked.get_submodule(WORDS)) is nn.Embedding
    assert unpacked.get_submodule(WORDS).weight.requires_grad
    unpacked.save_pretrained(tmp_path / "unpacked")
    assert torch.equal(logits(load(tmp_path / "unpacked"), batch), expected)
    assert {t.dtype for t in load_file(tmp_path / "unpacked" / "model.safetensors").values()} == {
        torch.float32,
        torch.int64,
    }
    restored = restore_model(model)
    assert type(restored.get_submodule(WORDS)) is nn.Embedding and not restored._state_dict_hooks


def test_binary_tables_stay_binary(tmp_path: Path) -> None:
    case = beyond.CASES["bert"]
    model = binarize_model(beyond.build("bert"), quick(**beyond.BOTH))
    train(model, case, 0, STEPS, STEPS)
    pack_model(model, real="int8").save_pretrained(tmp_path)
    assert WORDS not in get_plan(model).int8 and len(get_plan(model).int8) == 2
    assert torch.equal(logits(case.auto.from_pretrained(tmp_path), case.batch(7)), logits(model, case.batch(7)))


def test_training_goes_on(trained: Any, tmp_path: Path) -> None:
    """What an optimizer moves is rounded when it is saved; the tables stay."""
    model = pack_model(copy.deepcopy(trained), real="int8").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    table = model.get_submodule(WORDS).weight
    model(**BERT.batch(1)).loss.backward()
    optimizer.step()
    assert torch.equal(model.get_submodule(WORDS).weight, table)
    model.save_pretrained(tmp_path)
    moved, saved = logits(model, BERT.batch()), logits(load(tmp_path), BERT.batch())
    assert not torch.equal(moved, logits(trained, BERT.batch())) and torch.allclose(moved, saved, atol=5e-3)


def test_sizes(trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained.save_pretrained(tmp_path / "trained")
    found = {}
    for real in ("float32", "float16", "int8"):
        assert main(["pack", "--real", real, str(tmp_path / "trained"), str(tmp_path / real)]) == 0
        found[real] = inspect(tmp_path / real)
    assert "real parts stored as int8: 3 embedding tables in int8, the rest in float16" in capsys.readouterr().out
    for other, words in (("float32", "outputs equal, bit for bit"), ("int8", "outputs differ by")):
        assert main(["compare", str(tmp_path / "trained"), str(tmp_path / other)]) == 0
        assert words in capsys.readouterr().out
    bits = {real: (one.sizes["bits"], one.sizes["weight scales"]) for real, one in found.items()}
    assert len(set(bits.values())) == 1
    assert found["float16"].sizes["real"] * 2 == found["float32"].sizes["real"]
    rows, width = 100 + 32 + 2, 32
    saved = 4 * rows * width - rows * (width + 4)
    rest = found["float32"].sizes["real"] - 4 * rows * width
    assert found["int8"].sizes["real"] == found["float32"].sizes["real"] - saved - rest // 2


def test_what_is_refused(trained: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(trained)
    before = copy.deepcopy(model.state_dict())
    model.bert.pooler.dense.bias.data[3] = 1e6
    for real, message in (("int4", "'int4' is not one of 'float32', 'float16', 'bfloat16', 'int8'"), ("float16", "1e")):
        with pytest.raises(PackingError, match=message):
            pack_model(model, real=real)
        assert not get_plan(model).packed
    assert same_tensors(before, model.state_dict()) == ["bert.pooler.dense.bias"]
    pack_model(model, real="bfloat16")
    packed = pack_model(copy.deepcopy(trained), real="int8")
    packed.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for damage, message in (
        (lambda t: t.pop(f"{WORDS}.weight_step"), "weight_step is missing"),
        (
            lambda t: t.update({f"{WORDS}.weight_int8": t[f"{WORDS}.weight_int8"].float()}),
            "weight_int8 is F32 .* must be of whole numbers",
        ),
        (lambda t: t.update({f"{WORDS}.weight_int8": t[f"{WORDS}.weight_int8"][:-1].clone()}), "has the shape"),
        (lambda t: t.update({"bert.pooler.weight_int8": torch.zeros(2).char()}), "should not be there"),
    ):
        damaged = dict(tensors)
        damage(damaged)
        save_file(damaged, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((tmp_path / "config.json").read_text())
    values["quantization_config"].update(int8=[], digest=None)
    del values["quantization_config"]["digest"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"holds .*weight_int8, which"):
        load(tmp_path)


def test_the_benchmark_measures_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples" / "benchmarks"))
    import checkpoint_size

    BERT.build().save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["checkpoint_size.py", "--model", str(tmp_path), "--repeats", "0"])
    sizes = checkpoint_size.main()
    plain, training, packed, half, int8, binary, least = sizes.values()
    assert training > plain > packed > half > int8 > least and packed > binary > least
    printed = capsys.readouterr().out
    assert printed.count("equal") == 3 and "of a standard deviation" in printed
    assert f"{4 * 2 * (4 * 32 * 32 + 2 * 32 * 48):,} bytes" in printed  # the encoder's weights in float32
